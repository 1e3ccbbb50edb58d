"""What does a grammar take to be compiled? Found out where it hurts nobody.

A process of its own has vLLM's compilers ready. For each grammar it forks a child, which does all
that vLLM does with one before its first token, and is killed if that takes too much time or memory:

    the replica: `Sandbox`  <-- jobs, verdicts -->  `_Warden` (this module, run)  -- fork -->  child

The sandbox starts when it is first needed, which takes as long as importing vLLM. It ends with
the replica.
"""

import asyncio
import copy
import itertools
import math
import os
import pickle
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from serving.engine.vllm.lifeline import die_with_parent
from serving.stream.frames import MessageBuffer, framed

# A child may wait for a processor for so many times the time that it may use one.
_PATIENCE = 4.0
_LOOK_S = 0.02  # between two looks at what children take
_NICENESS = 10  # the engine goes first: compilers run on several threads
_MAX_ERROR_CHARS = 2000
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Limits(msgspec.Struct, frozen=True, array_like=True):
    """What compiling one grammar may take."""

    cpu_s: float
    num_bytes: int


class Job(msgspec.Struct, frozen=True, array_like=True):
    """A grammar, by the fields of vLLM's `StructuredOutputsParams`."""

    number: int
    fields: dict[str, Any]
    backend: str  # that the core compiles with; empty if it has yet to choose


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What came out: why the grammar is refused, or what vLLM would have made of it."""

    number: int
    error: str = ""
    backend: str = ""
    was_auto: bool = False


_encode = msgspec.msgpack.Encoder().encode
_decode_job = msgspec.msgpack.Decoder(Job).decode
_decode_verdict = msgspec.msgpack.Decoder(Verdict).decode


class SandboxEnded(Exception):
    """The sandbox ended before it had come to a verdict."""


class Sandbox:
    """The replica's end; runs on its event loop."""

    def __init__(self, vllm_config: Any, limits: Limits) -> None:
        self._vllm_config = vllm_config
        self._limits = limits
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Verdict]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._process: subprocess.Popen | None = None
        self._starting = asyncio.Lock()

    async def examine(self, fields: dict[str, Any], backend: str) -> Verdict:
        """Return the verdict on a grammar. Raise `SandboxEnded` if there is none."""
        job = Job(next(self._numbers), fields, backend)
        writer = await self.start()
        future = self._waiting[job.number] = asyncio.get_running_loop().create_future()
        try:
            writer.write(framed(_encode(job)))
            return await future
        finally:
            del self._waiting[job.number]

    async def start(self) -> asyncio.StreamWriter:
        """Start the process unless it runs. Return what to write to."""
        async with self._starting:
            if self._writer is not None and not self._writer.is_closing():
                return self._writer
            self.close()
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = await asyncio.to_thread(_start_process, theirs)
            reader, self._writer = await asyncio.open_connection(sock=ours)
            settings = await asyncio.to_thread(_pickled, self._vllm_config, self._limits)
            self._writer.write(framed(settings))
            self._reading = asyncio.get_running_loop().create_task(self._read(reader))
            return self._writer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                verdict = _decode_verdict(await reader.readexactly(size))
                future = self._waiting.get(verdict.number)
                if future is not None and not future.done():
                    future.set_result(verdict)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SandboxEnded())
        if self._writer is not None:
            self._writer.close()

    def close(self) -> None:
        """End the process."""
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _start_process(theirs: socket.socket) -> subprocess.Popen:
    number = str(theirs.fileno())
    return subprocess.Popen(
        [sys.executable, "-m", "serving.engine.vllm.grammar.sandbox", number, str(os.getpid())],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "CUDA_VISIBLE_DEVICES": "",  # nothing here needs one, and forks cannot share one
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
    )


def _pickled(vllm_config: Any, limits: Limits) -> bytes:
    """Return what the other end needs, as vLLM itself hands its configuration to its core."""
    config = copy.copy(vllm_config)
    config.parallel_config = copy.copy(config.parallel_config)
    config.parallel_config.distributed_executor_backend = None  # our class: a long import
    return pickle.dumps((config, limits))


# What follows runs in the sandbox.


class _Compilers:
    """vLLM's own, as its engine core has them."""

    def __init__(self, vllm_config: Any) -> None:
        from vllm.v1.structured_output import StructuredOutputManager

        self._config = vllm_config
        self._manager = StructuredOutputManager(vllm_config)
        self._manager._use_async_grammar_compilation = False
        self._backends: dict[str, Any] = {}
        chosen = vllm_config.structured_outputs_config.backend
        for name in ("xgrammar", "guidance") if chosen == "auto" else (chosen,):
            with suppress(Exception):  # one that this tokeniser cannot have
                self._compile({"json_object": True}, name)

    def examine(self, job: Job) -> Verdict:
        """Do what vLLM's API layer and its core do with a grammar, up to its first token."""
        try:
            outputs = self._compile(job.fields, job.backend)
        except Exception as error:
            text = str(error)[:_MAX_ERROR_CHARS] or type(error).__name__
            return Verdict(job.number, text)
        return Verdict(job.number, "", outputs._backend, outputs._backend_was_auto)

    def _compile(self, fields: dict[str, Any], backend: str) -> Any:
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams
        from vllm.v1.structured_output.request import StructuredOutputRequest

        manager = self._manager
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**fields))
        params._validate_structured_outputs(
            self._config.model_config, self._config.structured_outputs_config, manager.tokenizer
        )
        outputs = params.structured_outputs
        validated_for = outputs._backend
        outputs._backend = backend or validated_for
        manager.backend = self._backends.get(outputs._backend)
        request: Any = SimpleNamespace(
            request_id="",
            sampling_params=params,
            structured_output_request=StructuredOutputRequest(params=outputs),
        )
        manager.grammar_init(request)
        self._backends[outputs._backend] = manager.backend
        grammar = request.structured_output_request.grammar
        if isinstance(grammar, Exception):
            raise grammar
        if (matcher := getattr(grammar, "ll_matcher", None)) is not None and (
            error := matcher.get_error()
        ):
            raise ValueError(error)
        allowed = manager.backend.allocate_token_bitmask(1)
        grammar.fill_bitmask(allowed, 0)
        if not allowed.any():
            raise ValueError("The grammar allows nothing to begin with.")
        outputs._backend = validated_for
        return outputs


class _Child:
    """A process that examines one grammar."""

    def __init__(self, job: Job, compilers: _Compilers, limits: Limits) -> None:
        self.job = job
        self.pipe, writer = os.pipe()
        self.killed_for = ""
        self._limits = limits
        self._deadline_s = time.monotonic() + _PATIENCE * limits.cpu_s
        self.pid = os.fork()
        if self.pid == 0:
            try:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                cpu_s = math.ceil(limits.cpu_s)
                resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
                # Beyond it an allocation fails, of memory not yet touched as well.
                top = _own_bytes(os.getpid()) + int(_PATIENCE * limits.num_bytes)
                resource.setrlimit(resource.RLIMIT_DATA, (top, top))
                os.write(writer, _encode(compilers.examine(job)))
            finally:
                os._exit(0)
        os.close(writer)
        self._first_bytes = _own_bytes(self.pid)

    def check(self) -> None:
        """Kill it if it takes too much."""
        if self.killed_for:
            return
        if _own_bytes(self.pid) - self._first_bytes > self._limits.num_bytes:
            self.killed_for = "memory"
        elif time.monotonic() > self._deadline_s:
            self.killed_for = "time"
        if self.killed_for:
            os.kill(self.pid, signal.SIGKILL)

    def verdict(self) -> Verdict:
        """Return what it found, now that it has ended."""
        found = os.read(self.pipe, 2**16)
        os.close(self.pipe)
        _, status = os.waitpid(self.pid, 0)
        if found and not self.killed_for:
            return _decode_verdict(found)
        limits = self._limits
        if self.killed_for == "memory" or os.WIFEXITED(status) or os.WTERMSIG(status) in _MEMORY:
            excess = f"{limits.num_bytes >> 20} MiB of memory (engine.grammar_max_bytes)"
        else:
            excess = f"{limits.cpu_s:g} s (engine.grammar_timeout_s)"
        return Verdict(self.job.number, f"Compiling the grammar takes more than {excess}.")


# How a compiler ends that gets no memory, and what ends who asks for too much.
_MEMORY = frozenset((signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS))


def _own_bytes(pid: int) -> int:
    """Return the memory of a process that it shares with no file."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * _PAGE_BYTES


class _Warden:
    """Takes jobs, has children do them, and tells what they found."""

    def __init__(self, connection: socket.socket, compilers: _Compilers, limits: Limits) -> None:
        self._connection = connection
        self._compilers = compilers
        self._limits = limits
        self._max_children = max(2, min(8, len(os.sched_getaffinity(0)) // 2))
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._jobs: deque[Job] = deque()
        self._children: dict[int, _Child] = {}  # by the pipe that they write to

    def add_job(self, body: bytes) -> None:
        """Take in a job as it was encoded."""
        self._jobs.append(_decode_job(body))

    def run(self, messages: MessageBuffer) -> None:
        """Work until the replica hangs up; what it sends goes to `messages`."""
        while True:
            while self._jobs and len(self._children) < self._max_children:
                child = _Child(self._jobs.popleft(), self._compilers, self._limits)
                self._children[child.pipe] = child
                self._selector.register(child.pipe, selectors.EVENT_READ)
            timeout_s = _LOOK_S if self._children else None
            for key, _ in self._selector.select(timeout_s):
                if key.fileobj is self._connection:
                    data = self._connection.recv(2**20)
                    if not data:
                        return
                    messages.feed(data, self.add_job)
                else:
                    self._end(self._children.pop(key.fd))
            for child in self._children.values():
                child.check()

    def _end(self, child: _Child) -> None:
        self._selector.unregister(child.pipe)
        self._connection.sendall(framed(_encode(child.verdict())))


def main() -> None:
    """Be the sandbox: arguments are the number of its socket, and the pid of the replica."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    os.nice(_NICENESS)
    messages = MessageBuffer()
    first: list[bytes] = []
    while not first:
        data = connection.recv(2**20)
        if not data:
            return
        messages.feed(data, first.append)
    vllm_config, limits = pickle.loads(first[0])
    warden = _Warden(connection, _Compilers(vllm_config), limits)
    for body in first[1:]:
        warden.add_job(body)
    warden.run(messages)


if __name__ == "__main__":
    main()
