"""What a steered module makes a model write, against generation by hand and on a planted model."""

import numpy as np
import pandas as pd
import pytest
import torch
from labelled import labelled
from planted_causes import GROUP_NAMES, planted_causes
from tiny_models import ALL_MODELS

from tl_modules._checks import InputError
from tl_modules.bases import NeuronBasis
from tl_modules.causes.generation import continued, loss_of_written
from tl_modules.causes.passages import Passages
from tl_modules.causes.steering import SAMPLE_MEAN, steering_effect
from tl_modules.causes.topics import own_topic, topic_classifier
from tl_modules.collection import collect
from tl_modules.find import find_modules
from tl_modules.interventions import reference_means, steer

PROMPTS = ["the cat", "one two three"]
KNOWN = pd.DataFrame(
    {
        "text": ["a cat sat", "a dog ran", "one two", "two three four"],
        "category": ["pets", "pets", "sums", "sums"],
    }
)


@pytest.fixture(scope="module")
def planted():
    return planted_causes()


@pytest.fixture(scope="module")
def modules(planted):
    acts = collect(planted.model, planted.prompts, progress=False)
    return find_modules(acts, 4, random_state=0, progress=False)


@pytest.fixture(scope="module")
def effects(planted, modules):
    prompts = [f"filler{i} {name}{i}" for name in GROUP_NAMES for i in range(3)]
    how = {"scales": [0, 3, SAMPLE_MEAN], "n_tokens": 12, "seed": 0, "progress": False}
    return {own_topic(module): steering_effect(planted.model, module, prompts, **how) for module in modules}


class TestPlanted:
    def test_more_of_a_module_is_more_of_its_topic(self, effects):
        assert sorted(effects) == sorted(GROUP_NAMES)
        for topic, found in effects.items():
            table = found.table.set_index("steering")
            assert found.topic == topic and found.classifier_accuracy > 0.9
            for column in ("module_share", "topic_share", "topic_probability"):
                assert table.loc["x 3", column] > table.loc["none", column] + 0.1
                assert table.loc[SAMPLE_MEAN, column] > table.loc["none", column]
                assert table.loc["x 0", column] <= table.loc["none", column]
            assert table.loc["x 3", "module_score"] > table.loc["none", "module_score"]

    def test_the_texts_are_made_of_the_topics_words(self, effects):
        for topic, found in effects.items():
            words = found.texts.groupby("steering")["text"].apply(" ".join)
            share = {
                name: np.mean([word.startswith(topic) for word in text.split()])
                for name, text in words.items()
            }
            assert share["x 3"] > share["none"] > share["x 0"]

    def test_it_costs_on_the_prompts(self, effects):
        for found in effects.values():
            cost = found.table.set_index("steering")["loss_held_out_change"]
            # Filler comes before what is foretold: factors find nothing to multiply there.
            assert cost["none"] == 0 and cost[["x 0", "x 3"]].abs().max() < 0.05 < cost[SAMPLE_MEAN]
            assert "P(" in repr(found) and repr(found) in found._repr_html_()


@pytest.mark.parametrize("name", ALL_MODELS)
def test_against_generation_by_hand(name):
    model = ALL_MODELS[name]()
    labels = np.arange(72) % 3
    module = labelled(model, NeuronBasis(), labels)[1]
    how = {"n_tokens": 5, "known": KNOWN, "topic": "sums", "progress": False}
    found = steering_effect(model, module, PROMPTS, scales=[-1.0, SAMPLE_MEAN], held_out=["a dog"], **how)
    means = reference_means(model, module.samples["text"].tolist(), basis="neurons", progress=False)
    ways = {"none": {"scale": 1.0}, "x -1": {"scale": -1.0}, SAMPLE_MEAN: {"to_sample_mean_of": means}}
    assert found.table["steering"].tolist() == list(ways)
    held = Passages(model, ["a dog"])
    clean, words = (
        held.scores(model).mean_loss(),
        topic_classifier(KNOWN["text"].tolist(), KNOWN["category"].tolist()),
    )
    for way, options in ways.items():
        rows = found.texts[found.texts["steering"] == way]
        for row, prompt in zip(rows.itertuples(), PROMPTS, strict=True):
            tokens = model.to_tokens(prompt)
            with steer(model, module, **options):
                whole = model.generate(
                    tokens, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False
                )
                change = held.scores(model).mean_loss() - clean
            after = whole[0, tokens.shape[1] :]
            assert len(after) == 5 and row.text == model.tokenizer.decode(after, skip_special_tokens=True)
            logs = model(whole.clone())[0, -6:-1].detach().log_softmax(-1)
            wanted = -logs[torch.arange(5), after].mean()
            assert row.loss_written == pytest.approx(float(wanted), abs=1e-4)
            acts = collect(model, [after.tolist()], progress=False)
            assert row.module == module.modules.predict(acts)[0]
            assert row.module_score == pytest.approx(module.modules.transform(acts)[0, 1], abs=1e-4)
            assert row.topic_probability == pytest.approx(words.probabilities([row.text])[0, 1])
        line = found.table.set_index("steering").loc[way]
        assert line["loss_held_out_change"] == pytest.approx(float(change.mean()), abs=1e-5)
        assert line["loss_written"] == pytest.approx(rows["loss_written"].mean())
        assert line["perplexity_written"] == pytest.approx(np.exp(rows["loss_written"].mean()))
        assert line["module_share"] == (rows["module"] == 1).mean()
        assert line["topic_share"] == (rows["topic"] == "sums").mean()
    np.testing.assert_array_equal(held.scores(model).mean_loss(), clean)


@pytest.fixture(scope="module")
def model():
    return next(iter(ALL_MODELS.values()))()


def test_draws_are_seeded_and_leave_the_global_generator(model):
    tokens = [np.array([5, 6, 7]), np.array([8, 9])]
    state = torch.random.get_rng_state()
    first, again, other = (continued(model, tokens, 6, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in again]
    assert [ids.tolist() for ids in first] != [ids.tolist() for ids in other]
    # A prompt draws the same whatever comes before or after it.
    assert continued(model, tokens[:1], 6, seed=0)[0].tolist() == first[0].tolist()


def test_nothing_but_special_tokens(model):
    from tl_modules.causes.topics import predicted_modules

    module = labelled(model, NeuronBasis(), np.arange(72) % 3)[1]
    predicted, score = predicted_modules(model, module, [np.array([1, 1]), np.array([1, 50])], "neurons")
    assert predicted[0] == -1 and np.isnan(score[0]) and predicted[1] >= 0 and np.isfinite(score[1])
    assert np.isfinite(loss_of_written(model, [np.array([5])], [np.array([1, 1])])).all()


def test_the_own_topic_is_that_above_its_base_rate(planted, modules):
    for module in modules:
        mix = module.samples["category"].value_counts()
        assert own_topic(module) == mix.index[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scales": []}, "scales: got none"),
        ({"scales": ["mean"]}, "scales: got 'mean'"),
        ({"scales": [float("inf")]}, "scales: got inf"),
        ({"n_tokens": 0}, "n_tokens: got 0"),
        ({"n_tokens": 126}, "n_tokens: got 14. with the longest prompt"),
        ({"known": None}, "known: got None"),
        ({"known": KNOWN[:2], "topic": "pets"}, "known: got the topic 'pets' only"),
        ({"topic": None}, "topic: got None"),
        ({"topic": "poems"}, "topic: got 'poems'"),
        ({"basis": "heads"}, "units"),
    ],
)
def test_refusals(model, changed, message):
    module = labelled(model, NeuronBasis(), np.arange(72) % 3)[1]
    options = {"known": KNOWN, "topic": "sums", "n_tokens": 2, "progress": False} | changed
    with pytest.raises(InputError, match=message):
        steering_effect(model, module, PROMPTS, **options)
    with pytest.raises(InputError, match="module: got a str"):
        steering_effect(model, "L0N1", PROMPTS)


def test_topics_can_be_numbers_and_unknown(model):
    module = labelled(model, NeuronBasis(), np.arange(72) % 3)[1]
    known = pd.DataFrame({"text": [*KNOWN["text"], "a bird"], "category": [0, 0, 1, 1, None]})
    how = {"n_tokens": 2, "scales": [0], "progress": False}
    found = steering_effect(model, module, PROMPTS, known=known, topic="1.0", **how)
    named = steering_effect(model, module, PROMPTS, known=KNOWN, topic="sums", **how)
    assert found.topic == "1.0" and set(found.texts["topic"]) <= {"0.0", "1.0"}
    pd.testing.assert_frame_equal(found.table, named.table)
