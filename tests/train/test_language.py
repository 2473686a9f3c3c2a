"""Training with a language model: both stages, all methods, exact sums, hand-over, bad input."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.conftest import overrides
from tove_jax.cli.export import export_run_llava
from tove_jax.config import from_file
from tove_jax.config.schema import OptimConfig
from tove_jax.data import make_source
from tove_jax.data.conversation import IGNORED
from tove_jax.data.tokenizer import train_tokenizer
from tove_jax.errors import InputError, NonFiniteError
from tove_jax.eval.answerers import open_answerer
from tove_jax.experts.run import expert_cards, extract_all
from tove_jax.hf.load import load_clip
from tove_jax.language.decode import Decoding
from tove_jax.language.loss import next_tokens, token_losses
from tove_jax.train import loop
from tove_jax.train.checkpoint import load_language, load_student
from tove_jax.train.initial import initial_parameters
from tove_jax.train.language import run_tokenizer, tokenizer_hash
from tove_jax.train.loop import train
from tove_jax.train.merge import merge_settings
from tove_jax.train.metrics import read_rows
from tove_jax.train.state import flatten, parameter_factors

ROOT = Path(__file__).parents[2]
LANGUAGE = [
    "--config.language.width=32",
    "--config.language.layers=2",
    "--config.language.heads=2",
    "--config.language.kv_heads=1",
    "--config.language.mlp_width=48",
    "--config.text.limit=96",
    "--config.train.steps=2",
    "--config.data.held_out=0",
    "--config.data.source=llava",
]


def turns(*texts):
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def talks(prepared, tmp_path_factory):
    """A folder with LLaVA's two JSON files about the prepared pictures, features of them and of the blank one."""
    folder = tmp_path_factory.mktemp("talks")
    names = sorted(str(path.relative_to(prepared / "pictures")) for path in (prepared / "pictures").rglob("*.png"))[:12]
    plain = [{"id": n, "image": name, "conversations": turns("Describe it.\n<image>", f"picture number {n}")}
             for n, name in enumerate(names)]  # fmt: skip
    mixed = [{"id": n, "image": name, "conversations": turns("<image>\nWhat is this?", f"thing {n % 3}", "Sure?", "Yes.")}
             for n, name in enumerate(names[:8])]  # fmt: skip
    mixed += [{"id": f"t{n}", "conversations": turns(f"How much is {n} and {n}?", f"It is {2 * n}.")} for n in range(4)]
    mixed.append({"id": "two", "image": names[8:10], "conversations": turns("<image>\n<image>\nAlike?", "No.")})
    mixed += [{"id": name, "image": [name], "conversations": turns("<image>\nWell?", "Well.")} for name in names[10:]]
    for name, records in {"plain": plain, "mixed": mixed}.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    texts = [turn["value"] for record in plain + mixed for turn in record["conversations"]]
    train_tokenizer(texts, folder / "tokenizer", size=320)
    shutil.copytree(prepared / "start", folder / "start")
    extract_all(settings(prepared, folder, "mixed"), folder, progress=False)
    return folder


def settings(prepared, folder, file, *more, method="move_kd", arguments=""):
    base = {"move_kd": "configs/demo.py:smoke", "tove": "configs/demo.py:smoke,method=tove"}.get(method)
    base = base or "configs/hawaii_vit_l.py:smoke"
    words = overrides(
        prepared,
        *LANGUAGE,
        f"--config.data.path={folder / f'{file}.json'}",
        f"--config.data.images={prepared / 'pictures'}",
        f"--config.features.path={folder / 'features'}",
        f"--config.text.tokenizer={folder / 'tokenizer'}",
        f"--config.student.initialize={folder / 'start'}",
        *more,
        method=method,
    )
    return from_file(str(ROOT / base) + arguments, [w for w in words if "data.source=folder" not in w])


STAGE_1 = ("--config.language.kind=llava", "--config.text.template=plain", "--config.text.buckets=(64, 96)",
           "--config.optim.groups=(('.*/adapter/.*',1.0),('method/.*',1.0),('language/projector/.*',1.0),('.*',None))")  # fmt: skip
STAGE_2 = ("--config.language.kind=llava", "--config.text.template=v1", "--config.text.limit=224", "--config.text.pictures=2",
           "--config.optim.groups=(('.*',1.0),)")  # fmt: skip


def on_one(config, workdir):
    assert train(config, workdir, progress=False, devices=jax.devices()[:1]) == 0
    return read_rows(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def first(prepared, talks, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    rows = on_one(settings(prepared, talks, "plain", *STAGE_1), workdir)
    return workdir, rows


def test_stage_1_trains_projector_and_adapters_alone(first, talks):
    workdir, rows = first
    _, params, provenance = load_student(workdir)
    assert "language" not in params and provenance["tokenizer"]
    kept = load_language(workdir)
    started = load_student(workdir, None)[1]["student"]
    assert {path.split("/")[1] for path in kept} == {"projector", "model"}
    _, start = load_clip(talks / "start", image_size=32)
    for path, leaf in flatten(start).items():
        np.testing.assert_array_equal(np.asarray(flatten(started)[path]), leaf)
    assert rows[-1]["loss/text"] < rows[0]["loss/text"]
    # ln of 320 tokens is 5.77: a model that knows nothing.
    assert 4.5 < rows[0]["loss/text"] < 7 and 0 < rows[0]["text/padding"] < 1
    assert rows[0]["loss/total"] == pytest.approx(
        rows[0]["loss/text"] + 0.5 * rows[0]["loss/kd"] + 0.01 * rows[0]["loss/balance"], rel=1e-5
    )


def test_stage_2_goes_on_with_projector_adapters_and_heads(first, prepared, talks, tmp_path):
    workdir, _ = first
    handed, before = load_language(workdir), flatten(load_student(workdir)[1])
    config = settings(
        prepared, talks, "mixed", *STAGE_2, f"--config.train.start_from={workdir}", "--config.optim.lr=0",
        "--config.train.steps=1", "--config.train.checkpoint_every=1",
    )  # fmt: skip
    rows = on_one(config, tmp_path / "second")
    # A learning rate of nothing shows what the run began with.
    after = load_language(tmp_path / "second")
    for path, leaf in handed.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    for path, leaf in flatten(load_student(tmp_path / "second")[1]).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(before[path]), err_msg=path)
    assert np.isfinite(rows[0]["loss/total"])
    assert load_student(tmp_path / "second")[2]["source_language"]


def test_accumulation_and_meshes_give_the_same_step(prepared, talks, tmp_path):
    """The text loss is a mean over tokens, whatever the micro-batches and devices that hold them."""
    found = {}
    for name, more in {
        "one": (),
        "accumulated": ("--config.train.accumulation=4",),
        "mesh": ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
    }.items():
        config = settings(
            prepared, talks, "mixed", *STAGE_2, *more, "--config.train.steps=1", "--config.train.dtype=float32",
            "--config.student.adapter.dropout=0", "--config.text.by_modality=False",
        )  # fmt: skip
        devices = jax.devices()[:8] if name == "mesh" else jax.devices()[:1]
        assert train(config, tmp_path / name, progress=False, devices=devices) == 0
        params = {**load_language(tmp_path / name), **flatten(load_student(tmp_path / name)[1])}
        found[name] = (read_rows(tmp_path / name / "metrics.jsonl")[0], params)
    for name in ("accumulated", "mesh"):
        for metric in ("loss/text", "loss/kd", "loss/total", "optim/gradient_norm"):
            assert found[name][0][metric] == pytest.approx(found["one"][0][metric], rel=2e-5), (name, metric)
        for path, leaf in found["one"][1].items():
            # Adam's first step is lr * sign(gradient), so an update is compared where the gradient is not rounding.
            if path.endswith("key/bias"):  # softmax does not see it: all of its gradient is rounding
                continue
            difference = np.abs(np.asarray(found[name][1][path]) - np.asarray(leaf))
            assert (difference < 1e-5).mean() > 0.99, (name, path)


def test_experts_may_run_in_the_step(prepared, talks, tmp_path):
    """Several pictures a row, in half precision, one expert computed in place of read: nearly the same losses."""
    more = ("--config.train.dtype=bfloat16", "--config.train.steps=1", "--config.student.adapter.dropout=0")
    stored = on_one(settings(prepared, talks, "mixed", *STAGE_2, *more), tmp_path / "stored")[0]
    computed = settings(prepared, talks, "mixed", *STAGE_2, *more, "--config.features.online=('clip',)")
    found = on_one(computed, tmp_path / "online")[0]
    for name in ("loss/text", "loss/kd"):
        assert found[name] == pytest.approx(stored[name], rel=0.01)


def test_hawaii_reads_the_questions(prepared, talks, tmp_path):
    """Both stages: the second goes on with the first's heads, and the text head learns from the questions."""
    words = ("--config.method.instruction_width=32", "--config.method.instruction_tokens=12")
    before = settings(prepared, talks, "plain", *STAGE_1, *words, "--config.train.steps=1", method="hawaii")
    on_one(before, tmp_path / "first")
    config = settings(
        prepared, talks, "mixed", *STAGE_2, *words, f"--config.train.start_from={tmp_path / 'first'}", method="hawaii"
    )
    rows = on_one(config, tmp_path / "run")
    assert rows[-1]["loss/text"] > 0
    trained = flatten(load_student(tmp_path / "run")[1]["method"])
    drawn = flatten(initial_parameters(before, talks, expert_cards(before, talks))[0]["method"])
    first = flatten(load_student(tmp_path / "first")[1]["method"])
    # Captions ask nothing, so the first stage leaves the text head as drawn.
    np.testing.assert_array_equal(np.asarray(first["text/out/kernel"]), np.asarray(drawn["text/out/kernel"]))
    assert not np.array_equal(np.asarray(trained["text/out/kernel"]), np.asarray(drawn["text/out/kernel"]))
    with pytest.raises(InputError, match="instruction_width: expected language.width 32 or 0, found 16"):
        on_one(
            settings(prepared, talks, "mixed", *STAGE_2, "--config.method.instruction_width=16", method="hawaii"),
            tmp_path / "wrong",
        )


def test_losses_are_cross_entropy_with_smoothing():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 7, 6)).astype(np.float32)
    head = rng.normal(size=(6, 11)).astype(np.float32)
    labels = rng.integers(0, 11, (2, 7)).astype(np.int32)
    labels[0, :3] = labels[1, 5:] = IGNORED
    targets = next_tokens(jnp.asarray(labels))
    for smoothing in (0.0, 0.1):
        for chunk in (0, 3, 7):
            losses, right = token_losses(
                jnp.asarray(hidden), targets, lambda x: x @ head, smoothing=smoothing, chunk=chunk
            )
            logits = torch.tensor(hidden @ head)[:, :-1].reshape(-1, 11)
            wanted = torch.tensor(labels[:, 1:].astype(np.int64)).reshape(-1)
            expected = torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=smoothing)
            learned = int((targets != IGNORED).sum())
            np.testing.assert_allclose(losses.sum() / learned, expected, rtol=1e-5)
            hits = (logits.argmax(-1) == wanted) & (wanted >= 0)
            assert int(right.sum()) == int(hits.sum())


def test_chunks_have_the_gradient_of_the_whole():
    rng = np.random.default_rng(1)
    hidden, head = jnp.asarray(rng.normal(size=(2, 8, 6))), jnp.asarray(rng.normal(size=(6, 9)))
    targets = jnp.asarray(rng.integers(-1, 9, (2, 8))).at[0, 0].set(IGNORED)
    targets = jnp.where(targets < 0, IGNORED, targets)

    def total(chunk):
        return lambda h, w: token_losses(h, targets, lambda x: x @ w, chunk=chunk)[0].sum()

    for got, expected in zip(
        jax.grad(total(3), (0, 1))(hidden, head), jax.grad(total(0), (0, 1))(hidden, head), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--config.text.pictures=1",), "expected at most 1 pictures .config.text.pictures., found 2"),
        (("--config.text.template=chatml_",), "template: expected one of .*chatml"),
        (("--config.language.vocabulary=64",), "has 320 tokens, the language model tells 64 apart"),
        (("--config.text.buckets=(48,)",), "buckets: expected lengths up to text.limit 224"),
        (("--config.language.heads=3",), "width 32, heads 3 and kv_heads 1 do not fit"),
    ],
)
def test_settings_that_do_not_fit_are_refused(prepared, talks, tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        on_one(settings(prepared, talks, "mixed", *STAGE_2, *more), tmp_path)


def test_the_caption_head_and_a_language_model_exclude_each_other(prepared, talks, tmp_path):
    with pytest.raises(InputError, match="caption head stands in for a language model"):
        on_one(settings(prepared, talks, "plain", *STAGE_1, method="tove"), tmp_path)


def test_a_second_stage_reads_with_the_tokenizer_of_the_first(first, prepared, talks, tmp_path):
    other = train_tokenizer(["other words altogether"] * 3, tmp_path / "other", size=320)
    more = ("mixed", *STAGE_2, f"--config.train.start_from={first[0]}")
    with pytest.raises(InputError, match="first.*: was trained with tokenizer '.*', this run has"):
        on_one(settings(prepared, talks, *more, f"--config.text.tokenizer={tmp_path / 'other'}"), tmp_path / "run")
    source = shutil.copytree(first[0], tmp_path / "source")
    own = settings(
        prepared, talks, "mixed", *STAGE_2, f"--config.train.start_from={source}", "--config.text.tokenizer="
    )
    dialogues = make_source(own.data).dialogues
    assert tokenizer_hash(run_tokenizer(own, tmp_path / "drawn", dialogues, range(9))) != tokenizer_hash(other)
    shutil.copytree(tmp_path / "other", source / "tokenizer")
    assert tokenizer_hash(run_tokenizer(own, tmp_path / "handed", dialogues, range(9))) == tokenizer_hash(other)


def test_a_loss_that_is_not_finite_names_conversations(prepared, talks, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 2: .*; records of its batch: .*; conversations of its batch: \d"):
        on_one(
            settings(prepared, talks, "plain", *STAGE_1, "--config.optim.lr=1e38", "--config.optim.warmup=0"), tmp_path
        )


TOVE = ("--config.language.kind=tove", "--config.text.template=plain", "--config.method.text_weight=0",
        "--config.language.adaptor_width=8")  # fmt: skip
DEFAULT_GROUPS = f"--config.optim.groups={OptimConfig().groups!r}"


def test_tove_trains_around_a_frozen_decoder_answers_and_merges(prepared, talks, tmp_path):
    config = settings(prepared, talks, "plain", *TOVE, DEFAULT_GROUPS, method="tove")
    rows = on_one(config, tmp_path / "run")
    assert rows[-1]["loss/text"] < rows[0]["loss/text"]
    factors = parameter_factors(config.optim, load_language(tmp_path / "run"))
    trains = {path for path, factor in factors.items() if factor is not None}
    parts = {path.removeprefix("language/model/").removeprefix("layers/").split("/")[0] for path in trains}
    assert parts == {"cross", "cross_norm", "adaptor", "adaptor_norm", "head"}

    picture = np.full((40, 30, 3), 90, np.uint8)
    every = open_answerer(tmp_path / "run")
    some = open_answerer(tmp_path / "run", experts=["pp_ocr_det"])
    none = open_answerer(tmp_path / "run", experts=[])
    told = [model.rank([[picture]], [""], [["picture number 1", "thing"]])[0] for model in (every, some, none)]
    assert all(np.isfinite(scores).all() and scores.shape == (2,) for scores in told)
    assert len({tuple(scores) for scores in told}) == 3  # each expert's knowledge reaches the decoder
    assert isinstance(none.answer([[picture]], [""], Decoding(4))[0], str)
    with pytest.raises(InputError, match="'sam_l' is not attached"):
        open_answerer(tmp_path / "run", experts=["sam_l"])

    # Questions and answers, two pictures or none among them; now the decoder trains too.
    tuned = settings(
        prepared, talks, "mixed", *TOVE, "--config.text.template=vqa", "--config.text.limit=64",
        "--config.text.pictures=2", "--config.train.steps=1", f"--config.train.start_from={tmp_path / 'run'}",
        "--config.optim.groups=(('student/.*',None),('.*',1.0))", method="tove",
    )  # fmt: skip
    assert on_one(tuned, tmp_path / "tuned")[0]["loss/text"] > 0
    moved, body = load_language(tmp_path / "tuned"), "language/model/layers/mlp/fc1/kernel"
    assert not np.array_equal(moved[body], load_language(tmp_path / "run")[body])

    merging = dataclasses.replace(merge_settings(tmp_path / "run"), train=dataclasses.replace(config.train, steps=2))
    merging = dataclasses.replace(merging, optim=dataclasses.replace(merging.optim, lr=1e-2))
    rows = on_one(merging, tmp_path / "merged")
    assert {"loss/text", "loss/merge"} <= set(rows[0])
    kept, source = load_language(tmp_path / "merged"), load_language(tmp_path / "run")
    for path, leaf in source.items():
        np.testing.assert_array_equal(kept[path], leaf, err_msg=path)
    assert open_answerer(tmp_path / "merged").rank([[picture]], [""], [["a", "b"]])[0].shape == (2,)


def test_a_chat_answers_alike_alone_and_in_a_list(first):
    """Padding, other rows and kept picture tokens change no answer; the ranks are the model's own log-likelihoods."""
    chat = open_answerer(first[0], template="v1")
    pictures = [np.full((20 + n, 30, 3), 20 * n, np.uint8) for n in range(3)]
    questions = ["What is this?", "Is it a thing, or is it not one?", "Sure?"]
    shown = [[pictures[0]], [pictures[1], pictures[2]], []]
    chat = dataclasses.replace(chat, limit=512)
    together = chat.rank(shown, questions, [["Yes.", "No."]] * 3)
    alone = [chat.rank([s], [q], [["Yes.", "No."]])[0] for s, q in zip(shown, questions, strict=True)]
    for left, right in zip(together, alone, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4)
    assert together[0][0] != together[2][0]
    texts = chat.answer(shown, questions, Decoding(5))
    assert texts == [chat.answer([s], [q], Decoding(5))[0] for s, q in zip(shown, questions, strict=True)]
    with pytest.raises(InputError, match="expected at most 512 tokens with the answer"):
        chat.answer([[]], ["word " * 600], Decoding(5))
    with pytest.raises(InputError, match="expected 2 <image> for 2 pictures, found 1"):
        chat.answer([[pictures[0]] * 2], ["<image> what?"], Decoding(5))
    with pytest.raises(InputError, match="expected a run .checkpoints. or a Hugging Face folder"):
        open_answerer(first[0].parent)


def test_rows_may_be_shared_and_updates_of_low_rank(prepared, talks, tmp_path, monkeypatch):
    """Packing and LoRA: the decoder stays frozen, its updates train, several conversations share a row."""
    config = settings(
        prepared, talks, "mixed", *STAGE_2, "--config.text.pack=True", "--config.text.pictures=3", "--config.text.limit=448",
        "--config.language.lora_rank=4", "--config.train.batch=4",
        "--config.optim.groups=(('language/model/.*',None),('.*',1.0))",
    )  # fmt: skip
    counted, count = [], loop._Run._pictures

    def counting(self, step):
        counted.extend([count(self, step - 1), count(self, step)])
        return counted[-1]

    monkeypatch.setattr(loop._Run, "_pictures", counting)
    rows = on_one(config, tmp_path)
    assert np.isfinite(rows[-1]["loss/text"]) and rows[0]["text/padding"] < 0.5
    # The rate is of pictures: up to three a row.
    assert len(counted) == 2 and 4 < counted[0] <= 12 and rows[-1]["perf/images_per_s"] > 0
    kept = load_language(tmp_path)
    assert any(np.any(leaf) for path, leaf in kept.items() if path.endswith("b_kernel"))
    assert open_answerer(tmp_path).rank([[]], ["Sure?"], [["Yes.", "No."]])[0].shape == (2,)
    # The whole model goes out with its updates merged, and answers alike.
    folder = export_run_llava(None, tmp_path)
    assert "language model" in (folder / "README.md").read_text()
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    asked = ([[picture], []], ["What is this?", "How much is 2 and 2?"], Decoding(8))
    texts = open_answerer(folder).answer(*asked)
    assert texts == open_answerer(tmp_path).answer(*asked) and any(texts)
