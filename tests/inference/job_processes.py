"""A scripted job in as many processes as the launcher starts; run by test_jobs.

python -m torch.distributed.run --nproc_per_node 2 tests/inference/job_processes.py FOLDER SOURCES.txt OUTPUT die|live

With "die", process 1 is killed in the middle of its third row. Each process logs in the folder what it transcribed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from src.inference.files.jobs import part_path, run_job
from src.inference.files.transcribe import Transcription
from src.utils.runtime import join_processes, rank, world_size


def main(folder: Path, sources: Path, output: Path, die: bool) -> None:
    join_processes(patience=timedelta(minutes=2))
    folder.mkdir(exist_ok=True)
    with (folder / f"done-{rank()}.txt").open("a") as log:

        def transcribe(mine: list[str]) -> Iterator[Transcription]:
            for number, source in enumerate(mine):
                if die and rank() == 1 and number == 2:
                    with part_path(output, 1).open("ab") as part:
                        part.write(b'{"source": "half a row')
                    os.kill(os.getpid(), signal.SIGKILL)
                log.write(source + "\n")
                log.flush()
                yield Transcription(source, f"text of {Path(source).name}", 1.0)

        report = run_job(output, sources.read_text().splitlines(), transcribe, settings={"model": "scripted"})
    found = {"processes": world_size(), "recordings": report.recordings, "audio_sec": report.audio_sec}
    (folder / f"found-{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "die")
