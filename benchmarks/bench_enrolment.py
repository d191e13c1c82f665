"""Enrolment and identification up to 100,000 speakers; FAISS beside it.

    OMP_NUM_THREADS=1 python benchmarks/bench_enrolment.py [--quick]

FAISS is measured where ``faiss`` is installed: its exact index, and an
inverted file that looks into 16 of 1,024 cells, with the share of queries in
which it misses the best speaker.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Table, alternate

from speechbrain_ram.verification.enrolment import EnrolmentDatabase

DIM = 512


def faiss_cases(models: np.ndarray, queries: np.ndarray, truth: np.ndarray):
    """Searches by name, and the share of wrong answers of each."""
    try:
        import faiss
    except ImportError:
        return {}, {}
    faiss.omp_set_num_threads(1)
    exact = faiss.IndexFlatIP(DIM)
    exact.add(models)
    indices = {"FAISS, exact": exact}
    if len(models) >= 100_000:
        coarse = faiss.IndexFlatIP(DIM)
        cells = faiss.IndexIVFFlat(
            coarse, DIM, 1024, faiss.METRIC_INNER_PRODUCT
        )
        cells.train(models[:40_000])
        cells.add(models)
        cells.nprobe = 16
        indices["FAISS, inverted file"] = cells
    wrong = {
        name: float((index.search(queries, 1)[1][:, 0] != truth).mean())
        for name, index in indices.items()
    }
    cases = {
        name: lambda index=index: index.search(queries[:1], 5)
        for name, index in indices.items()
    }
    return cases, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", help="folder of the table")
    arguments = parser.parse_args()
    table = Table(
        "enrolment",
        "Enrolment database",
        f"{DIM} dimensions, one thread; speakers are random directions, a "
        "query is a speaker plus noise (cosine 0.7). 'Wrong' is the share of "
        "200 queries whose best speaker is not found.",
        ["speakers", "what", "time", "wrong"],
        arguments.output,
    )
    sizes = (1_000, 10_000) if arguments.quick else (1_000, 10_000, 100_000)
    generator = np.random.default_rng(0)
    for size in sizes:
        models = generator.standard_normal((size, DIM), dtype=np.float32)
        models /= np.linalg.norm(models, axis=1, keepdims=True)
        truth = generator.integers(size, size=200)
        noise = generator.standard_normal((200, DIM), dtype=np.float32)
        queries = models[truth] + 1.02 * noise / np.sqrt(DIM)
        names = [f"speaker {i:06d}" for i in range(size)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "speakers.db"
            database = EnrolmentDatabase(path, "benchmark", DIM)
            start = time.perf_counter()
            database.enrol_many(dict(zip(names, models, strict=True)))
            seconds = time.perf_counter() - start
            table.add(f"{size:,}", "enrol all at once", f"{seconds:.2f} s", "")
            start = time.perf_counter()
            database.enrol("one more", models[0] + models[1])
            seconds = time.perf_counter() - start
            megabytes = path.stat().st_size / 1e6
            table.add(
                f"{size:,}",
                f"enrol one more ({megabytes:.0f} MB)",
                f"{1000 * seconds:.0f} ms",
                "",
            )
            start = time.perf_counter()
            database.identify(queries[0])
            seconds = time.perf_counter() - start
            table.add(f"{size:,}", "open and identify", f"{seconds:.2f} s", "")
            found = [database.identify(q, top=1)[0].name for q in queries]
            wrong = np.mean(
                [f != names[t] for f, t in zip(found, truth, strict=True)]
            )
            shares = {"identify, exact matrix": wrong}
            cases = {
                "identify, exact matrix": lambda db=database, q=queries[0]: (
                    db.identify(q, top=5)
                )
            }
            more, more_wrong = faiss_cases(models, queries, truth)
            rounds = 5 if arguments.quick else 21
            times = alternate({**cases, **more}, rounds)
            shares.update(more_wrong)
            for name, measured in times.items():
                median = statistics.median(measured)
                table.note(f"{name}, {size}", measured)
                table.add(
                    f"{size:,}",
                    name,
                    f"{1000 * median:.2f} ms",
                    f"{100 * shares[name]:.1f} %",
                )
    table.write()


if __name__ == "__main__":
    main()
