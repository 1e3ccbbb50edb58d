"""What does a prompt of 100,000 tokens cost a gateway?

    python -m benchmarks.overhead.long_prompts

The CPU time of everything in a gateway that grows with a prompt, over the turns of conversations
that have grown so long: reading and hashing the body, placing the request among eight engines,
and what its engine tells of it. Engines, sockets and the copying of bytes in the kernel are left
out. A second client's prompts that nobody has sent before are the dear case beside it. Each form
of the core runs in processes of its own, in turn; of several runs the quietest counts, because
other programs only make it slower.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import msgspec
from rich.progress import track

from benchmarks.report.report import Report
from router import BlockUpdate, Dispatch, EngineInfo, EngineSnapshot, Router, RouterSettings, Usage
from serving.config import Config
from serving.core_form import VARIABLE
from serving.gateway.intake.request_headers import RequestHeaders
from serving.gateway.intake.request_parser import RequestParser
from serving.gateway.intake.served_models import ServedModels
from serving.stream.frames import Blocks, Prompt, Submit, decode_to_gateway, encode

SIZES = (1_000, 10_000, 100_000)  # tokens
TARGET_MS = 5.0  # of a prompt of the last size, whatever of it is known, in the served form
_NUM_ENGINES = 8
_NUM_TURNS = 12  # of each conversation; the first is new to everybody
_TURN_TOKENS, _REPLY_TOKENS = 500, 200
_BYTES_PER_TOKEN = 4
_BLOCK_TOKENS = 16
_PATH = "/v1/chat/completions"
# In the order in which they come.
STAGES = ("body read and hashed", "placed", "sent", "its blocks told", "prompt told", "ended")


class Gateway:
    """A gateway's parser and router, before engines of which nothing but this is simulated."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"long prompts {seed}")
        self.times_s: dict[str, list[float]] = {stage: [] for stage in STAGES}
        info = EngineInfo(
            model="m",
            tasks=("generate",),
            max_model_len=131_072,
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            max_prefill_chunk=1024,
            num_kv_tokens=456_908,
            block_size=_BLOCK_TOKENS,
            engine="simulated",
        )
        ids = [f"engine-{number}" for number in range(_NUM_ENGINES)]
        self._parser = RequestParser(Config(), ServedModels((), dict.fromkeys(ids, info)))
        self._router = Router(RouterSettings(seed=seed))
        self._now_s = 0.0
        self._num_requests = 0
        self._positions = dict.fromkeys(ids, 0)
        self._blocks: dict[str, set[int]] = {each: set() for each in ids}
        for each in ids:
            self._router.on_replica_up(each, info, 0.0)
            snapshot = EngineSnapshot(seq=1, num_free_kv_tokens=info.num_kv_tokens)
            self._router.on_snapshot(each, snapshot, 0.0)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began_s = time.process_time()
        yield
        self.times_s[stage].append(time.process_time() - began_s)

    def ask(self, messages: list[dict[str, str]], blocks: list[int]) -> int:
        """Have a request answered whose prompt has these KV blocks. Return its cached tokens."""
        body = msgspec.json.encode({"model": "m", "messages": messages, "stream": True})
        self._now_s += 1.0
        self._num_requests += 1
        with self._timed("body read and hashed"):
            asked = self._parser.parse(
                _PATH,
                body,
                RequestHeaders([]),
                None,
                request_id=str(self._num_requests),
                now_s=self._now_s,
                wants_prefix=True,
            )
        request = asked.request
        with self._timed("placed"):
            decisions = self._router.on_arrival(request, self._now_s)
        [dispatch] = [each for each in decisions if isinstance(each, Dispatch)]
        with self._timed("sent"):
            submit = Submit(dispatch.booking, request.id, 0, 0, 0, "POST", _PATH, [], asked.body)
            encode([submit])
        replica_id, held = dispatch.replica_id, self._blocks[dispatch.replica_id]
        news = [block for block in blocks if block not in held]
        held.update(news)
        position = self._positions[replica_id]
        self._positions[replica_id] += len(news)
        update = BlockUpdate(since=position, until=position + len(news), stored=news)
        message = encode([Blocks(update)])[4:]
        with self._timed("its blocks told"):
            for frame in decode_to_gateway(message):
                if isinstance(frame, Blocks):
                    self._router.on_blocks(replica_id, frame.update)
        num_tokens = len(blocks) * _BLOCK_TOKENS
        message = encode([Prompt(dispatch.booking, num_tokens, blocks)])[4:]
        with self._timed("prompt told"):
            for frame in decode_to_gateway(message):
                if isinstance(frame, Prompt):
                    hashes = frame.block_hashes
                    self._router.on_prompt(request.id, replica_id, frame.num_tokens, hashes)
        usage = Usage(num_prompt_tokens=num_tokens, num_output_tokens=_REPLY_TOKENS)
        with self._timed("ended"):
            self._router.on_first_token(request.id, self._now_s)
            self._router.on_finish(request.id, usage, self._now_s)
        return dispatch.num_cached_tokens


def text(rng: random.Random, num_tokens: int) -> str:
    """Return text of so many tokens, as a gateway counts them."""
    return rng.randbytes(num_tokens * _BYTES_PER_TOKEN // 2).hex()


def converse(num_tokens: int, seed: int) -> dict[str, dict[str, float]]:
    """Return the median CPU time of each stage, ms: of new prompts, and of a next turn.

    Prompts of so many tokens, each in as many conversations as turns.
    """
    gateway = Gateway(seed)
    rng = gateway.rng
    new: dict[str, list[float]] = {stage: [] for stage in STAGES}
    known: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for _ in range(3):
        messages = [{"role": "user", "content": text(rng, num_tokens)}]
        blocks = [rng.getrandbits(64) for _ in range(num_tokens // _BLOCK_TOKENS)]
        for turn in range(_NUM_TURNS):
            gc.collect()
            num_cached = gateway.ask(messages, blocks)
            assert not turn or num_cached > 0.9 * num_tokens
            for stage, times_s in gateway.times_s.items():
                (known if turn else new)[stage].append(times_s[-1])
            messages.append({"role": "assistant", "content": text(rng, _REPLY_TOKENS)})
            messages.append({"role": "user", "content": text(rng, _TURN_TOKENS)})
            num_new = (_REPLY_TOKENS + _TURN_TOKENS) // _BLOCK_TOKENS
            blocks = [*blocks, *(rng.getrandbits(64) for _ in range(num_new))]
    kinds = {"new": new, "next turn": known}
    return {
        kind: {stage: median(times_s) * 1e3 for stage, times_s in stages.items()}
        for kind, stages in kinds.items()
    }


def in_form(core: str, num_tokens: int, seed: int) -> dict[str, dict[str, float]] | None:
    """Return what `converse` gives in a process with this form of the core; None: there is none.

    Raises `CalledProcessError` if it fails for another reason.
    """
    environment = os.environ | {VARIABLE: core}
    is_there = [sys.executable, "-c", "import serving"]
    if subprocess.run(is_there, env=environment, stderr=subprocess.DEVNULL).returncode:
        return None
    command = [sys.executable, "-m", "benchmarks.overhead.long_prompts"]
    command += ["--child", str(num_tokens), "--seed", str(seed)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def run(num_repeats: int, seed: int) -> Report:
    """Time both forms in turn. Return the report."""
    config = {"num_engines": _NUM_ENGINES, "num_turns": _NUM_TURNS, "repeats": num_repeats}
    report = Report("long-prompts", "measured", seed, config)
    runs: dict[tuple[str, int], list[dict[str, dict[str, float]]]] = {}
    cases = [(core, size) for size in SIZES for core in ("plain", "compiled")]
    for core, size in track(cases * num_repeats, description="long prompts"):
        if (found := in_form(core, size, seed)) is not None:
            runs.setdefault((core, size), []).append(found)
    whole: dict[tuple[str, int, str], float] = {}
    for (core, size), repeats in sorted(runs.items(), key=lambda item: item[0][1]):
        for kind in repeats[0]:
            stages = min((each[kind] for each in repeats), key=_sum)
            whole[core, size, kind] = _sum(stages)
            report.add_row(
                "CPU time of one request, ms",
                prompt_tokens=size,
                prompt=kind,
                core=core,
                **stages,
                all=_sum(stages),
            )
    for (core, size, kind), all_ms in whole.items():
        report.add_row(
            "Ratios",
            prompt_tokens=size,
            prompt=kind,
            core=core,
            over_shortest=all_ms / whole[core, SIZES[0], kind],
            over_plain=all_ms / whole.get(("plain", size, kind), all_ms),
        )
    served = "compiled" if ("compiled", SIZES[-1], "new") in whole else "plain"
    worst_ms = max(whole[served, SIZES[-1], kind] for kind in ("new", "next turn"))
    name = f"CPU time of a prompt of {SIZES[-1]:,} tokens, ms ({served})"
    report.add_target(name, worst_ms, f"<= {TARGET_MS:g}")
    report.add_note(f"Of each row the quietest of {num_repeats} runs: others only make it slower.")
    return report


def _sum(stages: dict[str, float]) -> float:
    return sum(stages.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the quietest counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(converse(options.child, options.seed)))
        return 0
    run(options.repeats, options.seed).finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
