"""Goldens (stored results of the reference) are intact, and reference and `mlx_impl` still compute them.

A change that alters trainer and reference in the same way passes every comparison of the two, but not this
one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fixtures import make_goldens
from fixtures.make_goldens import CASES, COMMAND, FOLDER, NUM_UPDATES, Arrays, is_factor
from tests.derived import require, require_same_names, within_exact
from tests.trainers.mlx_impl import MlxTrainer

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_every_stored_array_and_every_weight_made_anew_has_its_sha256(name: str) -> None:
    """Bytes, type and shape are unchanged, and so are the settings in the manifest."""
    inputs, arrays = make_goldens.read(name)
    entry = make_goldens.read_manifest()["cases"][name]
    assert (inputs.keys(), arrays.keys()) == (entry["inputs"].keys(), entry["arrays"].keys())
    assert entry["settings"] == CASES[name].settings()


@every_case
def test_the_reference_computes_every_stored_array_to_1e_12(name: str) -> None:
    stored, (_, computed) = make_goldens.read(name)[1], make_goldens.compute(CASES[name])
    require_same_names(name, computed, stored)
    require(name, [within_exact(key, computed[key], stored[key]) for key in stored])


def mlx_results(name: str) -> Arrays:
    """What `mlx_impl` computes from the inputs in float64, without PyTorch."""
    golden, (inputs, _) = CASES[name], make_goldens.read(name)
    weights = {n: a for n, a in inputs.items() if not is_factor(n)}
    factors = {n: a for n, a in inputs.items() if is_factor(n)}
    batch = golden.batch()
    with MlxTrainer.exact():
        trainer = MlxTrainer(golden.spec, weights, golden.lora, factors)
        nats, num_targets = trainer.loss(batch)
        results = {
            "logits": trainer.logits(batch.inputs_BT),
            "nats": np.array(nats),
            "num_targets": np.array(num_targets),
            **{f"gradient/{n}": g for n, g in trainer.gradients(batch).items()},
        }
        for num_updates in NUM_UPDATES:
            trainer = MlxTrainer(golden.spec, weights, golden.lora, factors)
            losses = trainer.train([[batch]] * num_updates, golden.training)
            results[f"after {num_updates}/losses"] = np.array(losses)
            results |= {f"after {num_updates}/{n}": f for n, f in trainer.factors().items()}
    return results


def hold_mlx_to_the_stored_arrays(name: str) -> None:
    stored, results = make_goldens.read(name)[1], mlx_results(name)
    require_same_names(name, results, stored)
    worst = require(name, [within_exact(key, results[key], stored[key]) for key in stored])
    print(f"{name}: worst of {len(stored)}: {worst.name} used {worst.used:.2%} of 1e-12")


def test_without_pytorch_mlx_impl_computes_every_stored_array_to_1e_12() -> None:
    """Logits, loss, gradients and ten AdamW updates, in a process that cannot import PyTorch."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tests.properties.test_goldens import CASES, hold_mlx_to_the_stored_arrays\n"
        "for name in CASES: hold_mlx_to_the_stored_arrays(name)"
    )
    root = FOLDER.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def copy_of_goldens(folder: Path) -> Path:
    return Path(shutil.copytree(FOLDER, folder / "golden"))


def change(path: Path, key: str, factor: float) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez_compressed(path, allow_pickle=False, **{**arrays, key: arrays[key] * factor})


def test_a_changed_array_is_named_with_the_command_that_rewrites_it(tmp_path: Path) -> None:
    """Even if only its last bits changed."""
    folder = copy_of_goldens(tmp_path)
    change(folder / "plain.npz", "logits", 1 + 2.0**-52)
    with pytest.raises(ValueError, match=r"plain\.npz: array logits must be .* rewrite: python -m fixtures"):
        make_goldens.read("plain", folder)
    (found,) = make_goldens.differing(folder)
    assert "logits" in found and COMMAND in found


def test_an_array_changed_together_with_its_sha256_is_named_too(tmp_path: Path) -> None:
    """Because it is not what the reference computes."""
    folder, key = copy_of_goldens(tmp_path), "after 10/losses"
    change(folder / "plain.npz", key, 1 + 1e-10)
    with np.load(folder / "plain.npz") as file:
        changed = make_goldens.identity(file[key])
    manifest = make_goldens.read_manifest(folder)
    manifest["cases"]["plain"]["arrays"][key] = changed
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (found,) = make_goldens.differing(folder)
    assert key in found and "off by 1e-10" in found and COMMAND in found


def git(root: Path, *words: str) -> None:
    author = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", *author, *words], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    (tmp_path / "fixtures").mkdir()
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    return tmp_path


def test_goldens_are_not_written_from_a_dirty_tree(repository: Path) -> None:
    """Otherwise nobody could say which code wrote them."""
    (repository / "code.py").write_text("a = 2\n")
    with pytest.raises(ValueError, match=r"must be written from a clean tree.* 1 files differ.*code\.py"):
        make_goldens.write(repository)
    assert not (repository / "fixtures" / "golden").exists()


def test_goldens_are_written_from_a_clean_tree_and_over_committed_ones(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost, since git has the old ones. Writing again gives the same arrays."""
    make_goldens.write(repository)
    assert "inf" in capsys.readouterr().out
    first = make_goldens.read_manifest(repository / "fixtures" / "golden")
    with pytest.raises(ValueError, match=r"manifest.json: is not as in the last commit"):
        make_goldens.write(repository)
    git(repository, "add", ".")
    git(repository, "commit", "-m", "goldens")
    make_goldens.write(repository)
    last_column = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert last_column == {"0"}
    again = make_goldens.read_manifest(repository / "fixtures" / "golden")
    assert again.pop("commit") != first.pop("commit")
    assert again == first
    assert list(make_goldens.differing(repository / "fixtures" / "golden")) == []
