"""Exports read by the trainers' own loaders, out of their wheels (`make loaders`; needs a package registry).

The wheels come without their dependencies, and of their packages only the modules that a loader is made of are run: the
packages' own imports of engines and kernels are left out. DeepSpec and DistillKit are in no registry.
"""

import importlib
import importlib.machinery
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import datasets
import pytest
import torch
from export_datasets import PROMPTS, SHAPE, aux, normed_dataset, target_weights
from tiny_datasets import random_trace

from distill_pipe.consume import ShardReader
from distill_pipe.consume.adapters import TrainerSamples, trainer_layout
from distill_pipe.consume.export import export
from distill_pipe.consume.exporters import ExportOptions
from distill_pipe.store.finalize import finalize
from distill_pipe.store.root import LocalRoot

pytestmark = pytest.mark.loaders
WHEELS = ("specforge==0.2.*", "nvidia-modelopt==0.47.*", "nemo-automodel==0.7.*", "angelslim==0.5.*", "axolotl==0.19.*")
SEQ = 12


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels, unpacked into one folder."""
    folder = tmp_path_factory.mktemp("wheels")
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, *WHEELS],
                   check=True)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="session")
def hollow(wheels: Path) -> types.SimpleNamespace:
    """Import single modules of the wheels: `module(name)`, and `package(name)` for what a module wants of a package
    whose own code is not run. What was imported stays: `make loaders` is a process of its own."""

    def package(name: str) -> types.ModuleType:
        parent, _, _ = name.rpartition(".")
        if parent:
            package(parent)
        if name not in sys.modules:
            made = types.ModuleType(name)
            made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            made.__path__ = [str(wheels / name.replace(".", "/"))]
            sys.modules[name] = made
        return sys.modules[name]

    def module(name: str, *others: str) -> types.ModuleType:
        for other in (name.rpartition(".")[0], *others):
            package(other)
        return importlib.import_module(name)

    return types.SimpleNamespace(package=package, module=module)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    normed_dataset(folder)
    finalize(LocalRoot(folder))
    return folder


def adapted(root: Path, trainer: str, options: ExportOptions) -> dict[int, dict[str, torch.Tensor]]:
    layout = trainer_layout(root, trainer, options)
    batches = list(ShardReader(root, layers=layout.layers, batch_tokens=40))
    ordinals = [int(o) for b in batches for o in b.ordinals_B]
    return dict(zip(ordinals, TrainerSamples(batches, layout), strict=True))


def assert_items_equal(loaded: dict[str, torch.Tensor], item: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == item.keys()
    for name, tensor in loaded.items():
        expected = torch.as_tensor(tensor)
        assert item[name].dtype == expected.dtype, name
        assert torch.equal(item[name], expected), name


def test_specforge_normalises_every_file(root, hollow, tmp_path) -> None:
    export(root, "specforge", tmp_path)
    reader = hollow.module("specforge.runtime.data_plane.offline_reader", "specforge.runtime")
    data = hollow.module("specforge.algorithms.eagle3.data")
    store = hollow.module("specforge.runtime.data_plane.feature_store")
    refs = reader.OfflineManifestReader(str(tmp_path), validate_files=True).read()
    raw = [store.load_feature_file(ref.feature_store_uri.removeprefix("file://")) for ref in refs]
    assert len(raw) == PROMPTS
    for number, item in adapted(root, "specforge", ExportOptions()).items():
        assert_items_equal(raw[number], item)
        sample = data.normalize_offline_sample(item, 64)
        trace = random_trace(number, SHAPE)
        assert torch.equal(sample["hidden_state"][0], aux(trace, (1, 2, 3)))
        assert sample["target"].shape == (1, trace.num_tokens - 1, SHAPE.hidden_size)
        assert sample["loss_mask"][0, :-1].tolist() == trace.loss_mask_T[:-2].astype(int).tolist()


def test_modelopt_collates_dumps_and_adapted_samples(root, hollow, tmp_path) -> None:
    export(root, "modelopt", tmp_path)
    utils = hollow.module("modelopt.torch.speculative.eagle.utils", "modelopt.torch.utils")
    files = sorted(tmp_path.rglob("*.pt"), key=lambda p: int(p.stem.rpartition("_")[2]))
    dataset = utils.OfflineSupervisedDataset(files, answer_only_loss=True)
    items = adapted(root, "modelopt", ExportOptions())
    for number in range(PROMPTS):
        assert_items_equal(dataset[number], items[number])
    batch = utils.EagleOfflineDataCollator(16)([items[i] for i in range(4)])
    assert batch["base_model_outputs"]["base_hidden_prenorm"] is False
    assert batch["base_model_outputs"]["aux_hidden_states"].shape == (4, 16, 24)


@pytest.mark.parametrize(("trainer", "module", "dataset", "draft_vocab"), [
    ("automodel-eagle3", "eagle3_cache", "CachedEagle3Dataset", None),
    ("automodel-eagle3", "eagle3_cache", "CachedEagle3Dataset", 20),
    ("automodel-dspark", "dspark_cache", "CachedDSparkDataset", None)])
def test_automodels_caches_yield_what_the_adapters_do(root, hollow, tmp_path, trainer, module, dataset, draft_vocab
                                                      ) -> None:
    target_weights(tmp_path / "target")
    options = ExportOptions(seq_length=SEQ, draft_vocab=draft_vocab, target=tmp_path / "target")
    export(root, trainer, tmp_path / "out", options)
    cache = hollow.module(f"nemo_automodel.components.datasets.llm.{module}", "nemo_automodel.shared")
    loaded = getattr(cache, dataset)(str(tmp_path / "out"))
    assert len(loaded) == PROMPTS
    for number, item in adapted(root, trainer, options).items():
        assert_items_equal(loaded[number], item)
        if "target_probs" in item:
            trained = item["position_mask"][:, 0]
            torch.testing.assert_close(item["target_probs"][trained].float().sum(1), torch.ones(int(trained.sum())),
                                       rtol=0, atol=0.02)
    if trainer == "automodel-eagle3":
        assert cache.read_target_embeddings(str(tmp_path / "out")).shape == (SHAPE.vocab_size, SHAPE.hidden_size)
    else:
        assert cache.read_target_weight_modules(str(tmp_path / "out"))[1].weight.shape == (64, 8)


def test_angelslim_takes_every_file(root, hollow, tmp_path, recwarn) -> None:
    export(root, "angelslim", tmp_path)
    hollow.package("angelslim.utils").rank0_print = print
    builder = hollow.module("angelslim.compressor.speculative.train.data.dataset_builder.offline_dataset_builder")
    dataset = builder.OfflineEagle3Dataset(str(tmp_path), cache_in_memory=True)
    assert len(dataset) == PROMPTS
    items = adapted(root, "angelslim", ExportOptions())
    for number, path in enumerate(dataset.ckpt_files):
        assert_items_equal(dataset[number], items[int(path.stem.rpartition("_")[2])])
    assert not [w for w in recwarn if "checkpoint" in str(w.message).lower()]


def test_axolotl_collates_rows_into_a_finite_loss(root, hollow, tmp_path) -> None:
    export(root, "axolotl", tmp_path)
    loss = hollow.module("axolotl.integrations.kd.topk_logprob.forward_kl").loss
    rows = datasets.load_from_disk(tmp_path)
    items = adapted(root, "axolotl", ExportOptions())
    for number, row in enumerate(rows):
        stored = {name: torch.tensor(values) for name, values in row.items()}
        for name, tensor in items[number].items():
            assert torch.equal(tensor.to(stored[name].dtype), stored[name]), name
        logits_1TV = torch.randn(1, len(stored["input_ids"]), SHAPE.vocab_size, requires_grad=True)
        found = loss(logits_1TV, *(stored[n][None] for n in ("target_token_ids", "target_logprobs", "target_mask")))
        found.backward()
        supervised = logits_1TV.grad[0].abs().sum(1) > 0
        assert supervised.nonzero()[:, 0].tolist() == random_trace(number, SHAPE).positions_R.tolist()
