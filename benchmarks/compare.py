"""What changed between two results of one benchmark: NEW over OLD, row by row.

python -m benchmarks.compare OLD.json NEW.json
python -m benchmarks.compare joint_step NEW.json        # a name is one of docs/results
"""

import argparse
import sys
from pathlib import Path

from benchmarks.results import number, read
from joint_train.command import start
from joint_train.errors import ConfigError


def ratios(old: dict, new: dict) -> list[tuple[str, str, float, float]]:
    """(row, column, old, new) for each number that both results have.

    Raises:
        ConfigError: they are of different benchmarks, or have no row in common.
    """
    if old["benchmark"] != new["benchmark"]:
        raise ConfigError(f"these are of different benchmarks: {old['benchmark']} and {new['benchmark']}")
    texts = [name for name, (_, form) in new["columns"].items() if not form]
    numbers = [name for name, (_, form) in new["columns"].items() if form and name in old["columns"]]

    def named(result: dict) -> dict[str, dict]:
        return {", ".join(str(row[name]) for name in texts if row.get(name) is not None): row for row in result["rows"]}

    before, after = named(old), named(new)
    found = []
    for row in after:
        for name in numbers if row in before else ():
            pair = number(before[row].get(name)), number(after[row].get(name))
            if None not in pair:
                found.append((row, new["columns"][name][0], *pair))
    if not found:
        raise ConfigError("the two results have no row in common: they were made with other options")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    options = parser.parse_args(argv)

    def run() -> None:
        old, new = read(options.old), read(options.new)
        for name, result in (("old", old), ("new", new)):
            commit = result["versions"].get("commit", "unknown")[:10]
            print(f"{name}: {result['date']}, commit {commit}, {result['machine']}")
        if old["machine"] != new["machine"]:
            print("They were measured on different machines: ratios of seconds say little.")
        print("\n| row | column | old | new | new / old |\n| --- | --- | --- | --- | --- |")
        for row, column, before, after in ratios(old, new):
            quotient = f"{after / before:.3f}" if before else ""
            print(f"| {row} | {column} | {before:.5g} | {after:.5g} | {quotient} |")

    return start("benchmarks.compare", run)


if __name__ == "__main__":
    sys.exit(main())
