"""Look at what is learned, and how: `python diagnose.py SUBJECT [config/x.toml] [--key=value ...]`

- recall: what each kind of attention recalls from its text, by the number of pairs; controls that must fail.
- stability: what an older report's four fixes do to real training, one by one, at a usual and at a high rate.
- checkpoint PATH: the health of a trained model, layer by layer.
- report: the older report's claims beside what this project measured.

`python diagnose.py SUBJECT --help` lists its options. Whatever takes long says before how long, and goes on where it
was stopped.
"""

from importlib import import_module

from configurator import UserError, cli

SUBJECTS = {"recall": "probes", "stability": "stability", "checkpoint": "health", "report": "claims"}  # their modules


def main(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    names = ", ".join(SUBJECTS)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"no subject: name one of {names} first, such as: python diagnose.py recall")
    if argv[0] not in SUBJECTS:
        raise UserError(f"{argv[0]!r} is no subject: use {names}")
    return import_module(SUBJECTS[argv[0]]).main(argv[1:])  # imported here: only one of them is needed


if __name__ == "__main__":
    cli(main)
