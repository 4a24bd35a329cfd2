#!/usr/bin/env python3
"""Measures how fast other libraries find the keys nearest to a layer's queries: faiss and usearch.

FOLDER holds case.json, keys.f32, queries.f32 and truth.i32; README.md says what is in them. One lookup is what one
layer of a model asks at one step: each KV head's index is searched once, with the queries of all tokens and query heads
that share it, one KV head after the other. The time is that of the searches with the calls from Python; what they found
is turned into blocks and compared with the truth afterwards. Layers take turns, so that keys come from memory and not
from a cache. Prints one JSON object per peer and setting, or {"peer", "skipped"} where a peer cannot be measured.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Protocol

try:
    import numpy as np
except ImportError:  # Said per peer, below.
    np = None  # type: ignore[assignment]

PIP_NAMES = {"faiss": "faiss-cpu"}
CORES = len(os.sched_getaffinity(0))
LOOKUPS_MIN = 10
SWEEP_QUERIES = 16
# The same for every graph. More than the packages' own values: it builds longer and finds more.
GRAPH_LINKS = 32
GRAPH_BUILD_EFFORT = 128


def log(message: str) -> None:
    print(f"lookup.py: {message}", file=sys.stderr, flush=True)


def emit(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def percentile(times_us: list[float], share: float) -> float:
    """As landmarkdb's own figures are taken: the nearest measured time."""
    return round(sorted(times_us)[int((len(times_us) - 1) * share + 0.5)], 1)


def doublings(first: int, last: int) -> Iterator[int]:
    """first, 1.5 first, 2 first, 3 first ... last: a peer works at most half as much again as it would have to."""
    for power in itertools.count():
        for effort in dict.fromkeys((first << power, (first << power) * 3 // 2)):
            if effort >= last:
                yield last
                return
            yield effort


class Case:
    """What is asked, and of which keys."""

    def __init__(self, folder: pathlib.Path) -> None:
        case = json.loads((folder / "case.json").read_text())
        self.layers: int = case["layers"]
        self.keys_per_block: int = case["keys_per_block"]
        self.query_tokens: int = case["query_tokens"]
        self.top_k: int = case["top_k"]
        self.lookups: int = case["lookups"]
        self.recall: float = case["recall"]
        self.seconds: float = case["seconds"]
        self.peers: list[str] = case["peers"]
        self.keys_per_head: int = case["blocks"] * self.keys_per_block
        # So many keys lie in top_k blocks at least, even if the best blocks are found with all of their keys.
        self.hits = min((self.top_k - 1) * self.keys_per_block + 1, self.keys_per_head)

        if np is None:
            return
        kv_heads, head_dim = case["kv_heads"], case["head_dim"]
        shape = (self.layers, kv_heads, self.keys_per_head, head_dim)
        self.keys = np.memmap(folder / "keys.f32", "<f4", "r", shape=shape)

        def by_kv_head(file: str, dtype: str, width: int) -> np.ndarray:
            """(queries, tokens, query heads, width) as (queries, KV heads, tokens and heads of the group, width)."""
            rows = np.fromfile(folder / file, dtype)
            rows = rows.reshape(case["queries"], self.query_tokens, kv_heads, case["query_heads"] // kv_heads, width)
            rows = rows.transpose(0, 2, 1, 3, 4)
            return np.ascontiguousarray(rows).reshape(case["queries"], kv_heads, -1, width)

        self.queries = by_kv_head("queries.f32", "<f4", head_dim)
        self.truth = by_kv_head("truth.i32", "<i4", case["truth_width"])


class Engine(Protocol):
    """One peer in one setting. An effort is the number that trades time for recall; an exact peer has named modes."""

    version: str
    exact: bool

    def build(self, keys: np.ndarray) -> Any: ...
    def efforts(self, keys: int) -> Iterator[int]: ...
    def setting(self, effort: int) -> str: ...
    def set(self, index: Any, effort: int, threads: int) -> None: ...
    def search(self, index: Any, queries: np.ndarray, hits: int) -> Any: ...
    def found(self, answer: Any) -> np.ndarray: ...


class Faiss:
    exact = False

    def __init__(self) -> None:
        self.faiss = importlib.import_module("faiss")
        self.version: str = self.faiss.__version__

    def search(self, index: Any, queries: np.ndarray, hits: int) -> Any:
        return index.search(queries, hits)

    def found(self, answer: Any) -> np.ndarray:
        return answer[1]


class FaissFlat(Faiss):
    """Every key is scanned: by faiss's own kernels, and by a BLAS, which faiss leaves to much larger batches."""

    exact = True

    def __init__(self) -> None:
        super().__init__()
        self.default_threshold: int = self.faiss.cvar.distance_compute_blas_threshold

    def build(self, keys: np.ndarray) -> Any:
        index = self.faiss.IndexFlatIP(keys.shape[1])
        index.add(keys)
        return index

    def efforts(self, keys: int) -> Iterator[int]:
        return iter((self.default_threshold, 1))

    def setting(self, effort: int) -> str:
        return "f32, BLAS" if effort == 1 else "f32, default"

    def set(self, index: Any, effort: int, threads: int) -> None:
        self.faiss.cvar.distance_compute_blas_threshold = effort
        self.faiss.omp_set_num_threads(threads)


class FaissIvf(Faiss):
    """Keys in clusters; a search scans the nearest ones."""

    def build(self, keys: np.ndarray) -> Any:
        count, head_dim = keys.shape
        self.faiss.omp_set_num_threads(CORES)
        self.clusters = min(round(4 * math.sqrt(count)), count)
        index = self.faiss.index_factory(head_dim, f"IVF{self.clusters},Flat", self.faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # Or it warns of small cases.
        index.train(keys)
        index.add(keys)
        return index

    def efforts(self, keys: int) -> Iterator[int]:
        return doublings(1, self.clusters)

    def setting(self, effort: int) -> str:
        return f"f32, nlist {self.clusters}, nprobe {effort}"

    def set(self, index: Any, effort: int, threads: int) -> None:
        index.nprobe = effort
        self.faiss.omp_set_num_threads(threads)


class FaissHnsw(Faiss):
    """A graph of near keys."""

    def build(self, keys: np.ndarray) -> Any:
        self.faiss.omp_set_num_threads(CORES)
        index = self.faiss.IndexHNSWFlat(keys.shape[1], GRAPH_LINKS, self.faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = GRAPH_BUILD_EFFORT
        index.add(keys)
        return index

    def efforts(self, keys: int) -> Iterator[int]:
        return doublings(16, keys)

    def setting(self, effort: int) -> str:
        return f"f32, M {GRAPH_LINKS}, ef {effort}"

    def set(self, index: Any, effort: int, threads: int) -> None:
        index.hnsw.efSearch = effort
        self.faiss.omp_set_num_threads(threads)


class Usearch:
    """A graph of near keys, in f32 or f16."""

    exact = False

    def __init__(self, dtype: str) -> None:
        self.version: str = importlib.import_module("usearch").__version__
        self.index_type = importlib.import_module("usearch.index").Index
        self.dtype = dtype
        self.threads = 1

    def build(self, keys: np.ndarray) -> Any:
        count, head_dim = keys.shape
        index = self.index_type(
            ndim=head_dim, metric="ip", dtype=self.dtype, connectivity=GRAPH_LINKS, expansion_add=GRAPH_BUILD_EFFORT
        )
        index.add(np.arange(count, dtype=np.uint64), keys, threads=CORES)
        return index

    def efforts(self, keys: int) -> Iterator[int]:
        return doublings(16, keys)

    def setting(self, effort: int) -> str:
        return f"{self.dtype}, M {GRAPH_LINKS}, ef {effort}"

    def set(self, index: Any, effort: int, threads: int) -> None:
        index.expansion_search = effort
        self.threads = threads

    def search(self, index: Any, queries: np.ndarray, hits: int) -> Any:
        return index.search(queries, hits, threads=self.threads)

    def found(self, answer: Any) -> np.ndarray:
        # One query gets a row of what was found, several a table with what follows the counts undefined.
        if not hasattr(answer, "counts"):
            return answer.keys.astype(np.int64).reshape(1, -1)
        found = answer.keys.astype(np.int64)
        found[np.arange(found.shape[1]) >= answer.counts.astype(np.int64)[:, None]] = -1
        return found


ENGINES: dict[str, list[Callable[[], Engine]]] = {
    "faiss-flat": [FaissFlat],
    "faiss-ivf": [FaissIvf],
    "faiss-hnsw": [FaissHnsw],
    "usearch": [lambda: Usearch("f32"), lambda: Usearch("f16")],
}


class Bench:
    """An engine with its indexes built, one per layer and KV head, for as many layers as there is time for."""

    def __init__(self, engine: Engine, case: Case) -> None:
        self.engine, self.case = engine, case
        self.indexes: list[list[Any]] = []
        self.build_s = 0.0
        for layer in case.keys:
            started = time.perf_counter()
            self.indexes.append([engine.build(np.ascontiguousarray(keys)) for keys in layer])
            layer_s = time.perf_counter() - started
            self.build_s += layer_s
            if self.build_s + layer_s > case.seconds:
                break
        # Query i asks layer i % layers.
        self.asked = [query for query in range(len(case.queries)) if query % case.layers < len(self.indexes)]

    def set(self, effort: int, threads: int) -> None:
        for index in itertools.chain.from_iterable(self.indexes):
            self.engine.set(index, effort, threads)

    def lookup(self, query: int) -> tuple[float, list[Any]]:
        """Microseconds, and what each KV head's search answered."""
        search, hits = self.engine.search, self.case.hits
        heads = list(zip(self.indexes[query % self.case.layers], self.case.queries[query]))
        started = time.perf_counter_ns()
        answers = [search(index, queries, hits) for index, queries in heads]
        return (time.perf_counter_ns() - started) / 1000, answers

    def recall(self, answers: dict[int, list[Any]]) -> float:
        """Share of the right blocks that were found: the first top_k blocks in the order of their best keys.

        Blocks that tie with the last right one are as right; -1 fills the rows up and is no block.
        """
        right = asked = 0
        for query, answer in answers.items():
            for head, truth in zip(answer, self.case.truth[query]):
                for keys, blocks in zip(self.engine.found(head), truth):
                    found = dict.fromkeys((keys[keys >= 0] // self.case.keys_per_block).tolist())
                    right += len(set(itertools.islice(found, self.case.top_k)).intersection(blocks.tolist()))
                    asked += self.case.top_k
        return right / asked

    def sweep(self) -> int:
        """The least effort that finds enough, or the last one there was time for."""
        effort, deadline = 0, time.perf_counter() + self.case.seconds
        for effort in self.engine.efforts(self.case.keys_per_head):
            self.set(effort, 1)
            recall = self.recall({query: self.lookup(query)[1] for query in self.asked[:SWEEP_QUERIES]})
            log(f"{self.engine.setting(effort)}: recall {recall:.4f}")
            if recall >= self.case.recall or time.perf_counter() > deadline:
                break
        return effort

    def measure(self, peer: str, effort: int, threads: int) -> float:
        """Print the figures of one setting, and return the median."""
        self.set(effort, threads)
        self.lookup(self.asked[0])  # Starts the threads.
        times_us: list[float] = []
        answers: dict[int, list[Any]] = {}
        deadline = time.perf_counter() + self.case.seconds
        for query in itertools.islice(itertools.cycle(self.asked), max(self.case.lookups, LOOKUPS_MIN)):
            if len(times_us) >= LOOKUPS_MIN and time.perf_counter() > deadline:
                break
            time_us, answer = self.lookup(query)
            times_us.append(time_us)
            answers.setdefault(query, answer)
        p50_us = percentile(times_us, 0.5)
        emit(
            peer=peer,
            version=self.engine.version,
            setting=self.engine.setting(effort),
            threads=threads,
            layers=len(self.indexes),
            build_s=round(self.build_s, 3),
            p50_us=p50_us,
            p99_us=percentile(times_us, 0.99),
            lookups=len(times_us),
            recall=round(self.recall(answers), 4),
        )
        return p50_us


def run(peer: str, engine: Engine, case: Case) -> None:
    bench = Bench(engine, case)
    log(f"{peer}: {len(bench.indexes)} of {case.layers} layers built in {bench.build_s:.1f} s")
    if not engine.exact:
        bench.measure(peer, bench.sweep(), 1)
        return
    for effort in engine.efforts(case.keys_per_head):
        one_us = bench.measure(peer, effort, 1)
        # Only an exact scan of many queries has work for more than one core at every step.
        if case.query_tokens > 1 and CORES > 1 and bench.measure(peer, effort, CORES) > 2 * one_us:
            log("more threads were slower: OpenMP's threads spin while they wait, which harms where cores are busy")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: lookup.py FOLDER")
    case = Case(pathlib.Path(sys.argv[1]))
    for peer in case.peers:
        try:
            if np is None:
                raise ModuleNotFoundError(name="numpy")
            if peer not in ENGINES:
                emit(peer=peer, skipped=f"not a peer of this script, which knows {', '.join(ENGINES)}")
                continue
            for engine in ENGINES[peer]:
                run(peer, engine(), case)
        except ModuleNotFoundError as error:
            module = error.name or str(error)
            package = PIP_NAMES.get(module, module)
            emit(peer=peer, skipped=f"{module} is not installed: pip install {package}")
        except Exception as error:  # One peer's failure is no reason to lose the others.
            traceback.print_exc()
            emit(peer=peer, skipped=f"failed: {error!r}")


if __name__ == "__main__":
    main()
