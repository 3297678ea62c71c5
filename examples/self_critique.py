"""SelfCritique: a checker to put in Review's place. It argues for and against the solution before it gives its verdict.

    python train.py --operator-file examples/self_critique.py \\
        --operators Plan,Decompose,Programmer,Custom,AnswerGenerate,Test,SelfCritique,Verify,Revise,ScEnsemble,Aggregate,Format
"""

from operators import Context, Result, operator, read_verdict


@operator("SelfCritique", role="check", reads=("problem", "solution"),
          description="argues for and against the solution, then judges it",
          prompt="Give the best argument that this solution is right inside <for>...</for> and the best that it is wrong inside "
                 "<feedback>...</feedback>. Then say whether the first is stronger: <passed>yes</passed> or <passed>no</passed>.")
def self_critique(ctx: Context) -> Result:
    if not ctx.inputs["solution"]:
        return Result("", error="there is no solution to criticise; add a solver before it")
    return read_verdict(ctx.ask())
