"Run many jobs in parallel and append their rows to a file as they finish; jobs in the file are not run again."

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path


def end_with_parent() -> None:
    "End this worker if the parent process dies"
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()


def run(
    path: Path,
    jobs: Sequence[tuple],
    work: Callable[..., list[dict]],
    job_of: Callable[[dict], tuple],
    describe: Callable[[dict], str],
    processes: int,
) -> list[dict]:
    "Return the rows of all jobs, old and new. `work(*job)` makes them, `job_of(row)` returns a row's job, `describe(row)` is printed"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if path.exists()
        else []
    )
    rows = [row for row in rows if job_of(row) in jobs]
    done = {job_of(row) for row in rows}
    with ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
    ) as pool:
        for future in as_completed([pool.submit(work, *job) for job in jobs if job not in done]):
            found = future.result()
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(row) + "\n" for row in found))
            rows += found
            for row in found:
                print(describe(row), flush=True)
    return rows
