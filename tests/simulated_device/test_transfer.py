"""A copy on a device remembers what it was copied from, as long as it is a copy."""

from __future__ import annotations

import pytest

from tests.simulated_device.client import Device
from tests.simulated_device.events import COPY, WAIT
from tests.simulated_device.outcomes import Outcome

pytestmark = pytest.mark.xdist_group("simulated device")
SETUP = """
from alignment.models.forward.transfer import on_device, on_host, sent
from tests.simulated_device.events import events
device = torch.device("cuda", 0)
ids, mask, real = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.long), torch.ones(2, dtype=torch.bool)
events.clear()
"""


def _executed(device: Device, code: str) -> Outcome:
    outcome = device.execute(SETUP + code)
    assert outcome.error == ""
    assert outcome.faults == []
    return outcome


def _count(outcome: Outcome, kind: str) -> int:
    return sum(count for event, count in outcome.events.items() if event.kind == kind)


def test_columns_that_travel_together_arrive_as_they_were(device: Device) -> None:
    outcome = _executed(
        device,
        """
batch = sent({"ids": ids, "mask": mask, "real": real, "name": "row"}, device)
columns = [batch["ids"], batch["mask"], batch["real"]]
known = all(there is here for there, here in zip(on_host(*columns), (ids, mask, real)))
waits = sum(count for event, count in events.items() if event.kind == "wait")
devices = sorted({str(column.device) for column in columns})
result = [known, batch["name"], devices, waits, [column.tolist() for column in columns]]
""",
    )
    columns = [[[0, 1, 2], [3, 4, 5]], [[1, 1, 1], [1, 1, 1]], [True, True]]
    assert outcome.result == [True, "row", ["cuda:0"], 0, columns]
    assert _count(outcome, COPY) == 2, "one for each dtype"


def test_a_copy_that_was_changed_is_read_anew(device: Device) -> None:
    outcome = _executed(
        device,
        """
copy = on_device(ids, device)
same = on_host(copy)[0] is ids
copy[0, 0] = 7
result = [same, on_host(copy)[0].tolist(), ids.tolist()]
""",
    )
    assert outcome.result == [True, [[7, 1, 2], [3, 4, 5]], [[0, 1, 2], [3, 4, 5]]]


def test_what_is_not_known_is_read_at_once(device: Device) -> None:
    outcome = _executed(
        device,
        """
copy, other = on_device(ids, device), on_device(mask, device) * 2
result = [column.tolist() for column in on_host(other, copy, other[0] + 1)]
""",
    )
    assert outcome.result == [[[2, 2, 2], [2, 2, 2]], [[0, 1, 2], [3, 4, 5]], [3, 3, 3]]
    assert _count(outcome, WAIT) == 1


@pytest.mark.parametrize("made", ["ids.cuda()", "ids", "ids.float()"])
def test_what_is_there_already_stays(device: Device, made: str) -> None:
    outcome = _executed(
        device,
        f"""
tensor = {made}
there = sent({{"x": tensor}}, tensor.device)["x"]
result = there is tensor and sent({{"x": 3, "y": None}}, device) == {{"x": 3, "y": None}}
""",
    )
    assert outcome.result is True
