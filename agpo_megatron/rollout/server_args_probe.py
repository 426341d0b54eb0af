"""Run by file name with the servers' Python, which need not have this project: are these flags SGLang's, and values?

Argument: JSON {given: {name: value}, owned: {name: what to do instead}, words: {name: [words of the command line]}}.
Prints a JSON list of what is wrong. SGLang's own parser decides: names, aliases, types and choices are its.
"""

import argparse
import difflib
import json
import sys
from typing import NoReturn


class _Refused(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(message)


def main() -> None:
    from sglang.srt.server_args import ServerArgs

    asked = json.loads(sys.argv[1])
    parser = _Parser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    actions = {
        option.removeprefix("--").replace("-", "_"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    owned = {id(actions[name]): why for name, why in asked["owned"].items() if name in actions}
    problems = []
    for name, value in asked["given"].items():
        key = f"rollout.server_args.{name}"
        action = actions.get(name)
        if action is None or name == "help":
            near = difflib.get_close_matches(name, actions, n=1, cutoff=0.0)[0]
            problems.append(f"{key}: SGLang has no flag --{name}; nearest: {near}")
        elif id(action) in owned:
            problems.append(f"{key}: {owned[id(action)]}")
        elif value is False and f"no_{name}" in actions:
            problems.append(f"{key}: false would leave it out; write no_{name}: true")
        elif value is not None:
            required = [
                w for a in parser._actions if a.required for w in (a.option_strings[0], "x")
            ]
            try:
                parser.parse_args([*required, *asked["words"][name]])
            except _Refused as refused:
                problems.append(f"{key}: {refused}, not {value!r}")
    sys.stdout.write("\n" + json.dumps(problems) + "\n")


if __name__ == "__main__":
    main()
