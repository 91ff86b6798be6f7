"""What the demo says of proofs at its end."""

from typing import Any

from rich.console import Console

from fedeq_edge.cli.demo import _proofs

STATE = {"norm": "max", "gamma": 0.9, "evaluations": 6, "bound": 0.478, "unit": "state"}
INJECTION = {"norm": "rms", "gamma": 0.79, "evaluations": 8, "bound": 0.02, "unit": "injection"}


def shown(*certificates: dict[str, Any] | None) -> list[str]:
    devices = [{"id": f"device-{n}", "certificate": proof} for n, proof in enumerate(certificates)]
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(_proofs({"devices": devices, "model": {"cell": "residual"}}))
    return captured.get().replace("│", " ").splitlines()


def test_gamma_evaluations_and_bound_stand_beside_each_device() -> None:
    rows = {line.split()[0]: line.split()[1:] for line in shown(STATE, INJECTION, None) if "device-" in line}
    assert rows == {
        "device-0": ["0.900", "6", "4.8e-01", "max"],
        "device-1": ["0.790", "8", "2.0e-02", "rms(u)", "rms"],
        "device-2": ["-", "-", "no", "proof", "-"],
    }


def test_a_fleet_without_any_proof_is_told_so_in_one_line() -> None:
    told = " ".join(shown(None, None))
    assert told.startswith("no proof: a residual cell")
    assert "device" not in told
