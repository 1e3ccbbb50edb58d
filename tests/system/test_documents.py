"""Is each command of README and quickstart run by a test, as it is written there?"""

import subprocess

import pytest

from tests.docs.documents import ROOT, commands

PLAN = ".venv/bin/headway plan --model Qwen/Qwen3-8B"
ELSEWHERE = {
    "make install",  # before any test
    "make serve",  # tests/system/test_end_to_end.py, as are those of curl
    "make serve-emulated",  # tests/serving/gateway/seen/page/test_page.py
}
NOT_RUN = {
    ".venv/bin/headway serve --model Qwen/Qwen3-8B",  # needs a GPU, and the weights
}


@pytest.mark.timeout(300)
def test_each_command_of_the_documents_is_run_by_a_test() -> None:
    asked = {command for command in commands() if command.startswith("curl ")}
    assert commands() == ELSEWHERE | NOT_RUN | asked | {PLAN}
    done = subprocess.run(["sh", "-c", PLAN], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Qwen/Qwen3-8B" in done.stdout
