"""Run the reproductions against versions of SpeechBrain.

    python docs/host-issues/run.py                  # the one that is installed
    python docs/host-issues/run.py --patched        # the same with all patches
    python docs/host-issues/run.py 1.0.3 1.1.2      # from the package index

A version is installed into a temporary folder, without what it depends on: the
torch beside it is the one that is installed. Prints one line a reproduction.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
FILES = sorted(FOLDER.glob("[0-9]*.py"))
PATCHES = sorted(FOLDER.glob("[0-9]*.patch"))
# One process imports SpeechBrain and forks into one for each reproduction. They
# leave without Python's clearing up, which would take longer than all the rest.
# SpeechBrain 1.0 asks torchaudio for what torchaudio 2.9 and later do not have.
FORKS = """
import atexit, os, runpy, sys, traceback
import torchaudio
if not hasattr(torchaudio, "list_audio_backends"):
    torchaudio.list_audio_backends = lambda: ["soundfile"]
import speechbrain
for k, path in enumerate(sys.argv[2:]):
    pid = os.fork()
    if pid == 0:
        said, status = open(f"{sys.argv[1]}/{k}", "w"), 0
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            print(error, file=sys.stderr)
            status = 1
        except BaseException:
            traceback.print_exc()
            status = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)
    with open(f"{sys.argv[1]}/{k}.status", "w") as status:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=status)
"""


def run(packages=None):
    """What each reproduction shows, as {file's name: what}: "mended", "still
    there: ..." or, where it does not run at all, its last line.

    `packages` is a folder with another SpeechBrain than the installed one.
    """
    paths = [str(packages)] if packages else []
    paths += os.environ.get("PYTHONPATH", "").split(os.pathsep)
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [sys.executable, "-c", FORKS, place, *map(str, FILES)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            cwd=place,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            return {path.name: f"not imported: {last}" for path in FILES}
        results = {}
        for k, path in enumerate(FILES):
            text = Path(place, str(k)).read_text(encoding="utf-8").strip()
            last = text.splitlines()[-1] if text else ""
            status = int(Path(place, f"{k}.status").read_text())
            results[path.name] = last if status else "mended"
        return results


def patched(packages):
    """Copy the installed SpeechBrain into a folder and apply every patch."""
    (source,) = find_spec("speechbrain").submodule_search_locations
    shutil.copytree(source, Path(packages, "speechbrain"))
    for patch in PATCHES:
        apply(patch, packages)


def apply(patch, packages, *options):
    """Apply a patch to `packages`/speechbrain, or say why it does not."""
    done = subprocess.run(
        ["patch", "-p1", "--batch", "-d", packages, "-i", patch, *options],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{patch.name}: {done.stdout}{done.stderr}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("versions", nargs="*")
    parser.add_argument("--patched", action="store_true")
    options = parser.parse_args()
    for version in options.versions or [None]:
        with tempfile.TemporaryDirectory() as packages:
            if version is not None:
                pip = ["-m", "pip", "install", "-q", "--no-deps", "--target"]
                subprocess.run(
                    [sys.executable, *pip, packages, f"speechbrain=={version}"],
                    check=True,
                )
            elif options.patched:
                patched(packages)
            print(f"\n{version or 'installed'}")
            for name, what in run(packages).items():
                print(f"{re.sub('.py$', '', name):28} {what}", flush=True)


if __name__ == "__main__":
    main()
