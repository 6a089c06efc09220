"""The simulated device behaves as CUDA does where a test relies on it; copies remember what they are copies of."""

from __future__ import annotations

import pytest

from tests.simulated_device.client import Device, Outcome
from tests.simulated_device.events import COPY, WAIT

pytestmark = pytest.mark.xdist_group("simulated device")
TRANSFER = """
from alignment.models.forward.rows import on_device, on_host, sent
from tests.simulated_device.events import events
device = torch.device("cuda", 0)
ids, mask, real = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.long), torch.ones(2, dtype=torch.bool)
events.clear()
"""
SETUP = """
host, device = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).cuda()
from tests.simulated_device.events import events
events.clear()
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("device + host", "two devices, cuda:0 and cpu"),
        ("device.normal_(generator=torch.Generator())", "Expected a 'cuda:0' generator device but found 'cpu'"),
        ("device.numpy()", "can't convert cuda:0 device type tensor to numpy"),
        ("torch.nn.functional.embedding(torch.tensor([0]), device)", "two devices, cuda:0 and cpu"),
    ],
)
def test_what_cuda_refuses_is_refused(device: Device, code: str, message: str) -> None:
    assert message in device.execute(f"{SETUP}\n{code}").error


@pytest.mark.parametrize(
    ("code", "waits", "copies"),
    [
        ("device.sum().item()", 1, 0),
        ("bool((device > 1).any())", 1, 0),
        ("device[device > 1]", 1, 0),
        ("device[torch.tensor([0])]", 1, 0),
        ("host.cuda()", 1, 0),
        ("torch.cuda.synchronize()", 1, 0),
        ("device * 2", 0, 0),
        ("torch.tensor([1.0]).pin_memory().cuda(non_blocking=True)", 0, 1),
    ],
)
def test_each_wait_of_the_host_is_counted(device: Device, code: str, waits: int, copies: int) -> None:
    outcome = device.execute(f"{SETUP}\n{code}")
    assert outcome.error == ""
    assert (outcome.count(WAIT), outcome.count(COPY)) == (waits, copies)


def test_a_copy_to_the_host_that_is_not_waited_for_is_a_fault(device: Device) -> None:
    (fault,) = device.execute(f"{SETUP}\ndevice.to('cpu', non_blocking=True)").faults
    assert "which may read before it has ended" in fault


def test_attention_over_rows_equals_attention_row_by_row(device: Device) -> None:
    code = """
from torch.nn.attention.varlen import varlen_attn
torch.manual_seed(0)
drawn = [torch.randn(7, heads, 8, dtype=torch.bfloat16) for heads in (4, 2, 2)]
inputs = [one.cuda().requires_grad_() for one in drawn]
starts = torch.tensor([0, 3, 7], dtype=torch.int32).cuda()
out = varlen_attn(*inputs, starts, starts, 4, 4, window_size=(-1, 0), enable_gqa=True)
out.float().square().sum().backward()
plain = [one.float().requires_grad_() for one in drawn]
query, key, value = (one.transpose(0, 1)[None] for one in plain)
rows = [
    torch.nn.functional.scaled_dot_product_attention(
        query[:, :, span], key[:, :, span], value[:, :, span], is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    for span in (slice(0, 3), slice(3, 7))
]
expected = torch.cat(rows)
expected.square().sum().backward()
pairs = [(out.detach(), expected.detach()), *((one.grad, other.grad) for one, other in zip(inputs, plain))]
result = [float((one.cpu().float() - other).abs().max() / other.abs().max()) for one, other in pairs]
"""
    outcome = device.execute(code)
    assert outcome.error == ""
    assert max(outcome.result) < 2e-2  # bfloat16


def _executed(device: Device, code: str) -> Outcome:
    outcome = device.execute(TRANSFER + code)
    assert outcome.error == ""
    assert outcome.faults == []
    return outcome


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
    assert outcome.count(COPY) == 2, "one for each dtype"


def test_what_was_changed_or_is_not_known_is_read_anew_at_once(device: Device) -> None:
    outcome = _executed(
        device,
        """
copy, other = on_device(ids, device), on_device(mask, device) * 2
same = on_host(copy)[0] is ids
columns = [column.tolist() for column in on_host(other, copy, other[0] + 1)]
waits = sum(count for event, count in events.items() if event.kind == "wait")
copy[0, 0] = 7
result = [same, columns, waits, on_host(copy)[0].tolist(), ids.tolist()]
""",
    )
    unchanged = [[0, 1, 2], [3, 4, 5]]
    assert outcome.result == [
        True,
        [[[2, 2, 2], [2, 2, 2]], unchanged, [3, 3, 3]],
        1,
        [[7, 1, 2], [3, 4, 5]],
        unchanged,
    ]


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
