"""Debugger: a checker that runs the code with the public tests and names the line that fails, with its variables.

    python train.py --operator-file examples/debugger.py
"""

from operators import Context, Result, operator, run_program, run_tests

TRACER = '''
import sys
source = {source!r}
try:
    exec(compile(source, "<program>", "exec"), {{"__name__": "__main__"}})
except BaseException as error:
    trace, last = error.__traceback__, None
    while trace:
        last = trace if trace.tb_frame.f_code.co_filename == "<program>" else last
        trace = trace.tb_next
    if last is None:
        sys.exit(f"{{type(error).__name__}}: {{error}}")
    variables = {{k: repr(v)[:80] for k, v in last.tb_frame.f_locals.items() if not k.startswith("__") and not callable(v)}}
    line = source.splitlines()[last.tb_lineno - 1].strip()
    sys.exit(f"line {{last.tb_lineno}}: {{line}}\\n{{type(error).__name__}}: {{error}}\\nvariables: {{variables}}")
'''


@operator("Debugger", role="check", reads=("code",), prompt="",
          description="runs the code with the public tests and names the failing line and its variables")
def debugger(ctx: Context) -> Result:
    if not ctx.inputs["code"]:
        return Result("", error="there is no code to debug; add a solver before Debugger")
    source, stdin, tests = ctx.inputs["code"], "", ctx.public_tests
    if tests and run_tests(source, tests, ctx.entry_point).passed:
        return Result("passed the public tests", {"feedback": ""}, passed=True)
    if isinstance(tests, str):
        source += "\n" + tests
    elif ctx.entry_point:
        source += "".join(f"\nassert {ctx.entry_point}(*{case['input']!r}) == {case['output']!r}" for case in tests)
    else:
        stdin = tests[0]["input"]
    result = run_program(TRACER.format(source=source), stdin)
    if result.status == "ok" and not tests:
        return Result("runs without an error", {"feedback": ""}, passed=True)
    notes = result.stderr.strip()[-600:] or f"{result.status}; it printed {result.stdout.strip()[:200]!r}"
    return Result(notes, {"feedback": notes}, passed=False)
