"""`make test-fuzz`: each parser under atheris for some seconds, in a process of its own; the first finding ends it.

python tests/fuzz/run.py                 # every parser, 20 s each
python tests/fuzz/run.py 300 gguf graph  # two of them, five minutes each
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SECONDS = 20


def main(arguments: list[str]) -> int:
    """The exit code: 1 if a parser has let another exception through."""
    if arguments[:1] == ["--one"]:
        fuzz(*arguments[1:])
    seconds, *names = arguments or [str(SECONDS)]
    with TemporaryDirectory() as folder:
        chosen = names or [*all_parsers(Path(folder))]
    failed = [name for name in chosen if subprocess.run([sys.executable, __file__, "--one", seconds, name]).returncode]
    print(f"findings: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def all_parsers(folder: Path):  # type: ignore[no-untyped-def]
    from parsers import parsers

    return parsers(folder)


def fuzz(seconds: str, name: str) -> None:
    """Never returns: the fuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["qexport"]):
        import qexport.gates
        import qexport.recipe
        import qexport.tensors.gguf_file
        import qexport.tensors.safetensors_folder
        import qexport.text.prompts  # noqa: F401

    with TemporaryDirectory() as folder:
        parser = all_parsers(Path(folder))[name]
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(parser.seeds):
            (corpus / str(number)).write_bytes(seed)
        options = [
            f"-max_total_time={seconds}",
            "-timeout=10",
            "-rss_limit_mb=4096",
            "-print_final_stats=0",
            "-verbosity=0",
        ]
        atheris.Setup([sys.argv[0], *options, str(corpus)], lambda content: parser(content, Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
