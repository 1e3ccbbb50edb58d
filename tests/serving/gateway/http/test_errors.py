import pytest

from router.types import RejectReason
from serving.gateway.http.errors import rejection_error


@pytest.mark.parametrize("reason", RejectReason)
def test_every_refusal_has_words_and_a_status(reason):
    error = rejection_error(reason, 12.3)
    assert error.status in (400, 404, 429, 503)
    # vLLM knows one of them, too, and its code is the status.
    assert error.code == (404 if reason is RejectReason.UNKNOWN_MODEL else reason.value)
    assert str(error)


@pytest.mark.parametrize(
    "reason", [RejectReason.OVERLOADED, RejectReason.QUEUE_FULL, RejectReason.HOPELESS]
)
def test_too_much_is_429_and_says_when_to_come_back(reason):
    error = rejection_error(reason, 12.3)
    assert error.status == 429
    assert dict(error.headers())[b"retry-after"] == b"13"  # whole seconds, and none too early
    assert int(dict(rejection_error(reason, None).headers())[b"retry-after"]) >= 1
