"""Calculator: the executor writes one sympy expression, which is evaluated exactly, in the sandbox.

    python train.py --operator-file examples/calculator.py
"""

from mathgrade import math_answer
from operators import Context, Result, operator, run_program, tag, without_thinking


@operator("Calculator", role="solve", reads=("problem", "plan", "subproblems"),
          description="computes exactly: writes one sympy expression and evaluates it",
          prompt="Write one sympy expression whose value answers the problem, alone inside <expression>...</expression>. "
                 "Example: <expression>solve(x**2 - 2*x - 3, x)</expression>")
def calculator(ctx: Context) -> Result:
    reply = without_thinking(ctx.ask())
    expression = tag(reply, "expression") or math_answer(reply)
    if not expression or len(expression) > 1000:
        return Result("", error="the reply holds no <expression>...</expression> of at most 1000 characters")
    # sympify executes what it reads, and a language model wrote it: only in the sandbox.
    program = f"from sympy import *\nvalue = sympify({expression!r})\nprint(value.doit() if hasattr(value, 'doit') else value)"
    result = run_program(program, timeout=20.0, memory_mb=1024)
    if result.status != "ok" or not result.stdout.strip():
        return Result("", error=f"{expression} could not be evaluated: {result.status} {result.stderr.strip()[-200:]}")
    return Result(f"{expression} = {result.stdout.strip()}", {"solution": result.stdout.strip()})
