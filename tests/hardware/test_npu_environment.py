"""What an NPU asks of environment and packages, told without torch and without torch_npu."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from bc2exp.hardware import npu_environment, probe

UNSET: dict[str, str] = {}


def ranks(environment, **given):
    return probe.rank_environment("npu", 8, environment=environment, **given)


def test_what_ranks_are_started_with():
    found = ranks(UNSET)
    assert found["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1"
    assert found["PYTORCH_NPU_ALLOC_CONF"] == "expandable_segments:True"
    assert found["TASK_QUEUE_ENABLE"] == "2"
    # torch's process groups wait 1800 s; the nearer to the cause, the sooner it speaks
    assert int(found["HCCL_EXEC_TIMEOUT"]) < int(found["HCCL_EVENT_TIMEOUT"]) < 1800
    assert 120 <= int(found["HCCL_CONNECT_TIMEOUT"]) <= 7200
    assert "HCCL_SOCKET_IFNAME" not in found
    assert not npu_environment.DETERMINISTIC.keys() & found.keys()


def test_what_the_person_has_set_comes_first():
    chosen = {name: f"mine-{name}" for name in [*npu_environment.VARIABLES, "HCCL_EVENT_TIMEOUT"]}
    assert ranks(chosen) == chosen


@pytest.mark.parametrize(("mine", "event"), [("3600", "3660"), ("0", "0"), ("60", "120")])
def test_an_event_outlasts_the_collective_that_the_person_waits_for(mine, event):
    assert ranks({"HCCL_EXEC_TIMEOUT": mine})["HCCL_EVENT_TIMEOUT"] == event


def test_determinism_and_the_network_are_added_when_asked_for():
    found = ranks(UNSET, interface="eth7", deterministic=True)
    assert found["HCCL_DETERMINISTIC"] == "true"
    assert found["HCCL_SOCKET_IFNAME"] == "=eth7"
    assert probe.rank_environment("cuda", 8, environment=UNSET) == {}
    assert probe.rank_environment("cuda", 8, environment=UNSET, deterministic=True) == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8"
    }


@pytest.mark.parametrize("other", npu_environment.OTHER_ALLOCATORS)
def test_two_allocator_variables_are_refused_by_name(other):
    both = {other: "max_split_size_mb:64", "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    (sentence, *_) = npu_environment.problems(both, rehearsal=True)
    assert sentence.startswith(f"PYTORCH_NPU_ALLOC_CONF and {other} are set together")
    assert sentence.endswith("unset all but PYTORCH_NPU_ALLOC_CONF")
    # one alone is the person's choice, and ours does not stand beside it
    assert not list(npu_environment._allocators({other: "max_split_size_mb:64"}))
    assert "PYTORCH_NPU_ALLOC_CONF" not in ranks({other: "max_split_size_mb:64"})


@pytest.mark.parametrize(
    ("torch", "torch_npu", "other", "said"),
    [
        ("2.13.0+cpu", "2.13.0", None, None),
        ("2.13.1", "2.13.0rc1", None, None),
        ("2.13.0+cpu", "2.9.0", None, r"2\.13\.0\+cpu and torch_npu 2\.9\.0 do not pair.*_npu==2\.13\.\*'"),
        ("2.1.0", "2.13.0", None, r"do not pair; .*'torch==2\.1\.\*' 'torch_npu==2\.1\.\*'"),
        ("2.13.0", None, None, r"torch_npu is not installed, .*'torch_npu==2\.13\.\*'"),
        (None, "2.13.0", None, "torch is not installed"),
        ("2.13.0", "2.13.0", "cuda 13.0", r"built for cuda 13\.0, .* CPU build \(2\.13\.0\+cpu\)"),
    ],
)  # fmt: skip
def test_packages_that_do_not_pair_are_refused_with_the_pair_that_would(torch, torch_npu, other, said):
    found = npu_environment.unpaired(torch, torch_npu, other)
    if said is None:
        assert found is None
    else:
        assert re.search(said, found), found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\nxpu: Optional[str] = None\n", None),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "cuda 13.0"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", "hip 6.4"),
    ],
)
def test_what_torch_is_built_for_is_read_from_its_files(text, found, tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('torch was imported')")
    (tmp_path / "torch" / "version.py").write_text(text)
    code = "from bc2exp.hardware import npu_environment as n; print(n._other_device())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": f"{tmp_path}:."},
    )  # fmt: skip
    assert done.stdout.strip() == str(found)


def test_cann_is_looked_for_where_its_script_says(tmp_path, monkeypatch):
    monkeypatch.setattr(npu_environment, "unpaired", lambda *_: None)
    (sentence,) = npu_environment.problems(UNSET)
    assert "CANN is not in this environment" in sentence
    assert "set_env.sh" in sentence
    assert list(npu_environment.problems(UNSET, rehearsal=True)) == []
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libascendcl.so").touch()
    assert list(npu_environment.problems({"ASCEND_HOME_PATH": str(tmp_path)})) == []
    assert list(npu_environment.problems({"LD_LIBRARY_PATH": f"/nowhere:{tmp_path}/lib64"})) == []
    assert len(list(npu_environment.problems({"ASCEND_HOME_PATH": "/nowhere"}))) == 1


def test_other_devices_ask_for_nothing():
    assert probe.environment_problems("cpu") == probe.environment_problems("cuda") == []


def test_torch_is_not_imported_to_find_out():
    code = (
        "import sys; from bc2exp.hardware import probe; probe.environment_problems('npu');"
        "probe.rank_environment('npu', 8); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_cann_the_backend_is_refused_in_one_sentence():
    code = (
        "from bc2exp.hardware import get_backend\n"
        "from bc2exp.config.errors import UserError\n"
        "try: get_backend('npu')\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hardware.backend=npu: torch_npu cannot be loaded (")
    assert "set_env.sh" in done.stdout
