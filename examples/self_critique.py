"""SelfCritique: a checker to put in Review's place. It argues for and against the solution before it gives its verdict.

    python train.py --operator-file examples/self_critique.py \\
        --operators Plan,Decompose,Programmer,Custom,AnswerGenerate,Test,SelfCritique,Verify,Revise,ScEnsemble,Aggregate,Format
"""

from operators import Context, Result, operator, tag, without_thinking


@operator("SelfCritique", role="check", reads=("problem", "solution"),
          description="argues for and against the solution, then judges it",
          prompt="Give the best argument that this solution is right inside <for>...</for>, the best that it is wrong inside "
                 "<against>...</against>, then which is stronger: <verdict>right</verdict> or <verdict>wrong</verdict>.")
def self_critique(ctx: Context) -> Result:
    if not ctx.inputs["solution"]:
        return Result("", error="there is no solution to criticise; add a solver before it")
    reply = without_thinking(ctx.ask())
    verdict, against = (tag(reply, "verdict") or "").lower(), tag(reply, "against") or "the solution is wrong"
    if verdict not in ("right", "wrong"):
        return Result("", error="the reply holds no <verdict>right</verdict> or <verdict>wrong</verdict>")
    notes = "" if verdict == "right" else against
    return Result(notes or "passed", {"feedback": notes}, passed=verdict == "right")
