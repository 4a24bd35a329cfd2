#!/usr/bin/env python3
"""Measures what full attention costs in llama.cpp: prefill, decode steps, and the first token after a saved state.

FOLDER holds case.json, text.i32 and prompt.i32; README.md says what is in them. Each setting reads the beginning of the
text and goes on token by token. The fastest readers with flash attention and without then read the text up to each
length, save their state to a file, and a new context loads the file and reads the prompt. Prefill that takes longer than
`seconds` ends where it is, and the tokens in the output say where. Prints one JSON object per setting and per reopened state, or {"peer", "skipped"} where
llama.cpp cannot be measured.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pathlib
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

try:
    import numpy as np
except ImportError:  # Comes with llama.cpp's package, whose absence is said below.
    np = None  # type: ignore[assignment]

CORES = len(os.sched_getaffinity(0))
# Tokens that go through the model at once: llama.cpp's own default.
CHUNK_TOKENS = 512
REOPENINGS = 5
LOG_ERROR = 4


class Skip(Exception):
    """Why a peer cannot be measured here."""


def log(message: str) -> None:
    print(f"decode.py: {message}", file=sys.stderr, flush=True)


def emit(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


class Case:
    """What is read, and how long it may take."""

    def __init__(self, folder: pathlib.Path) -> None:
        case = json.loads((folder / "case.json").read_text())
        self.folder = folder
        self.model: str = case["model"]
        self.prefill_tokens: int = case["prefill_tokens"]
        self.context_tokens: int = case["context_tokens"]
        self.steps: int = case["steps"]
        self.reopened_tokens: list[int] = sorted(case["reopened_tokens"])
        self.seconds: float = case["seconds"]
        self.peers: list[str] = case["peers"]
        if np is not None:
            self.text = np.fromfile(folder / "text.i32", "<i4")
            self.prompt = np.fromfile(folder / "prompt.i32", "<i4")


class Setting(NamedTuple):
    """How the model is run. Weights are a model that llama.cpp has loaded, under the name of their type."""

    weights: str
    model: Any
    threads: int
    flash: bool

    def __str__(self) -> str:
        return f"{self.weights}, {'flash' if self.flash else 'plain'} attention"


class Context:
    """What a model has read so far."""

    def __init__(self, llama: Any, tokens_max: int, setting: Setting) -> None:
        self.llama = llama
        params = llama.llama_context_default_params()
        params.n_ctx = tokens_max
        params.n_batch = params.n_ubatch = CHUNK_TOKENS
        params.n_threads = params.n_threads_batch = setting.threads
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if setting.flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama.llama_init_from_model(setting.model, params)
        if not self.context:
            raise MemoryError(f"llama.cpp made no context of {tokens_max} tokens")
        self.vocabulary: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(setting.model))

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.llama.llama_free(self.context)

    def read(self, ids: np.ndarray) -> int:
        """Run tokens, at most a chunk, through the model; the likeliest next one."""
        tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
        status = self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(tokens, len(ids)))
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status}")
        logits = self.llama.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def warm(self, ids: np.ndarray) -> None:
        """Bring the weights into memory, and forget what was read for it."""
        self.read(ids[:1])
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def prefill(self, ids: np.ndarray, deadline: float) -> int:
        """Read chunk by chunk up to a time limit; how many tokens were read."""
        for first in range(0, len(ids), CHUNK_TOKENS):
            if first > 0 and time.perf_counter() > deadline:
                return first
            self.read(ids[first : first + CHUNK_TOKENS])
        return len(ids)

    def save(self, path: pathlib.Path, ids: np.ndarray) -> None:
        """Keep the state in a file, durable."""
        tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
        if not self.llama.llama_state_save_file(self.context, os.fsencode(path), tokens, len(ids)):
            raise OSError(f"llama_state_save_file wrote no {path}")
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def load(self, path: pathlib.Path, tokens_max: int) -> None:
        tokens, count = (ctypes.c_int32 * tokens_max)(), ctypes.c_size_t()
        if not self.llama.llama_state_load_file(self.context, os.fsencode(path), tokens, tokens_max, count):
            raise OSError(f"llama_state_load_file cannot use {path}")


class Bench:
    def __init__(self, case: Case, peer: str) -> None:
        self.case = case
        self.llama = importlib.import_module("llama_cpp")
        if not case.model.endswith(".gguf"):
            raise Skip("reads GGUF files, and the model is none: --model names one")

        @self.llama.llama_log_callback
        def complain(level: int, text: bytes, _: Any) -> None:
            if level == LOG_ERROR:
                log(text.decode(errors="replace").rstrip())

        self.complain = complain  # llama.cpp keeps its address only.
        self.llama.llama_log_set(complain, ctypes.c_void_p(0))
        self.llama.llama_backend_init()
        self.who = {"peer": peer, "version": f"(llama-cpp-python {self.llama.__version__})"}
        features = self.llama.llama_print_system_info().decode()
        log(features)
        if "AVX512 = 1" not in features and "avx512f" in pathlib.Path("/proc/cpuinfo").read_text():
            log("this build leaves AVX-512 unused: build it with -DGGML_NATIVE=ON")

    def weights(self) -> dict[str, Any]:
        """The model as it is, and in the type that llama.cpp multiplies fastest, which its file may not have."""
        original = self.load(pathlib.Path(self.case.model))
        params = self.llama.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.allow_requantize = CORES, self.llama.LLAMA_FTYPE_MOSTLY_Q4_0, True
        fast = self.case.folder / "fast.gguf"
        if self.llama.llama_model_quantize(os.fsencode(self.case.model), os.fsencode(fast), ctypes.byref(params)) != 0:
            raise OSError("llama_model_quantize wrote no model in Q4_0")
        return {self.type(original): original, "Q4_0": self.load(fast)}

    def load(self, path: pathlib.Path) -> Any:
        model = self.llama.llama_model_load_from_file(os.fsencode(path), self.llama.llama_model_default_params())
        if not model:
            raise Skip(f"llama.cpp cannot load {path.name}")
        return model

    def type(self, model: Any) -> str:
        """`Q4_1`, the end of a description such as `llama 256M Q4_1`."""
        text = ctypes.create_string_buffer(128)
        self.llama.llama_model_desc(model, text, len(text))
        return text.value.decode().split(maxsplit=2)[-1]

    def context(self, tokens_max: int, setting: Setting) -> Context:
        return Context(self.llama, tokens_max, setting)

    def speed(self, setting: Setting) -> float:
        """Print prefill and decode speed of one setting, and return the time that reading took per token."""
        case = self.case
        with self.context(max(case.prefill_tokens, case.context_tokens) + case.steps + 1, setting) as context:
            context.warm(case.text)
            started = time.perf_counter()
            deadline = started + case.seconds
            prefilled = context.prefill(case.text[: case.prefill_tokens], deadline)
            prefill_s = time.perf_counter() - started
            read = prefilled + context.prefill(case.text[prefilled : case.context_tokens], deadline)
            read_s = time.perf_counter() - started
            times_ms = list(self.steps(context, read))
        emit(
            **self.who,
            setting=str(setting),
            threads=setting.threads,
            speed={
                "prefill_tokens": prefilled,
                "prefill_tokens_per_s": prefilled / prefill_s,
                "step_tokens": read,
                "step_ms": statistics.median(times_ms),
                "steps": len(times_ms),
            },
        )
        return read_s / read

    def steps(self, context: Context, position: int) -> Iterator[float]:
        """Milliseconds of single tokens. The first one finds nothing in the caches and is not counted."""
        for step in range(self.case.steps + 1):
            started = time.perf_counter_ns()
            at = (position + step) % len(self.case.text)
            context.read(self.case.text[at : at + 1])
            if step > 0:
                yield (time.perf_counter_ns() - started) / 1e6

    def first_tokens(self, setting: Setting) -> None:
        """Print what it takes to go on after each length, with the state in the page cache and without."""
        case, path = self.case, self.case.folder / "state.bin"
        tokens_max = case.reopened_tokens[-1] + len(case.prompt)
        with self.context(tokens_max, setting) as context:
            context.warm(case.text)
            read, prefill_s, deadline = 0, 0.0, time.perf_counter() + case.seconds
            for tokens in case.reopened_tokens:
                started = time.perf_counter()
                read += context.prefill(case.text[read:tokens], deadline)
                prefill_s += time.perf_counter() - started
                started = time.perf_counter()
                context.save(path, case.text[:read])
                save_s = time.perf_counter() - started
                for pages in ("warm", "cold"):
                    reopen_ms, first_token_ms = self.reopen(setting, path, read, pages)
                    emit(
                        **self.who,
                        setting=str(setting),
                        threads=setting.threads,
                        first_token={
                            "tokens": read,
                            "pages": pages,
                            "stored_bytes": path.stat().st_size,
                            "prefill_s": prefill_s,
                            "save_s": save_s,
                            "reopen_ms": reopen_ms,
                            "first_token_ms": first_token_ms,
                        },
                    )
                path.unlink()
                if read < tokens:
                    log(f"prefill was stopped after {case.seconds:.0f} s and {read} of {tokens} tokens")
                    break

    def reopen(self, setting: Setting, path: pathlib.Path, tokens: int, pages: str) -> tuple[float, float]:
        """Median milliseconds until a new context has the state, and until it has read the prompt too."""
        reopen_ms, first_token_ms = [], []
        for _ in range(REOPENINGS):
            with path.open("rb") as file:
                if pages == "cold":
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            tokens_max = tokens + len(self.case.prompt)
            with self.context(tokens_max, setting) as context:
                context.load(path, tokens_max)
                reopen_ms.append((time.perf_counter() - started) * 1e3)
                context.read(self.case.prompt)
                first_token_ms.append((time.perf_counter() - started) * 1e3)
        return statistics.median(reopen_ms), statistics.median(first_token_ms)


def llama_cpp(case: Case, peer: str) -> None:
    bench = Bench(case, peer)
    settings = [
        Setting(weights, model, threads, flash)
        for weights, model in bench.weights().items()
        for flash in (True, False)
        for threads in sorted({1, CORES})
    ]
    token_s = {setting: bench.speed(setting) for setting in settings}
    # Which attention reads fastest and which answers first are two questions.
    for flash in (True, False):
        if case.reopened_tokens:
            bench.first_tokens(min((s for s in settings if s.flash == flash), key=token_s.__getitem__))


PEERS = {"llama.cpp": llama_cpp}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: decode.py FOLDER")
    case = Case(pathlib.Path(sys.argv[1]))
    for peer in case.peers:
        try:
            if peer not in PEERS:
                raise Skip(f"not a peer of this script, which knows {', '.join(PEERS)}")
            PEERS[peer](case, peer)
        except Skip as reason:
            emit(peer=peer, skipped=str(reason))
        except ModuleNotFoundError as error:
            emit(peer=peer, skipped=f"{error.name} is not installed: pip install llama-cpp-python")
        except Exception as error:  # One peer's failure is no reason to lose the others.
            traceback.print_exc()
            emit(peer=peer, skipped=f"failed: {error!r}")


if __name__ == "__main__":
    main()
