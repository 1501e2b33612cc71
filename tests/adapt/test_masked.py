import json

import pytest
import torch

from stillroom.adapt import masked
from stillroom.core.errors import UserError
from stillroom.data.load import load_images
from stillroom.lm.masked import load_masked_text
from stillroom.testing import assert_grads
from stillroom.vision.masked import load_masked_images
from stillroom.vision.saving import save_classifier

transformers = pytest.importorskip("transformers")
MAE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 2,
    "decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load_images("digits", seed=0, limit=40)


@pytest.fixture(scope="module")
def mae_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "mae"
    transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**MAE)).save_pretrained(folder)
    processor = {"do_resize": True, "size": 8, "image_mean": [0.4] * 3, "image_std": [0.3] * 3, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def bert(folder, kind="bert"):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(**shape) if kind == "bert" else transformers.RobertaConfig(**shape, pad_token_id=0)
    model = transformers.BertForMaskedLM(config) if kind == "bert" else transformers.RobertaForMaskedLM(config)
    model.save_pretrained(folder)
    return folder


def test_patches_are_in_the_order_of_mae(mae_folder):
    model = transformers.ViTMAEForPreTraining.from_pretrained(mae_folder)
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(masked.patchify(images, 2), model.patchify(images))


def test_error_is_maes_own_with_normalised_pixels(mae_folder, data):
    """The public configurations have norm_pix_loss off; the method has it on."""
    model = load_masked_images(f"hf:{mae_folder}", data=data, ratio=0.75)
    images = data.train.images()[:6]
    torch.manual_seed(1)
    values, _ = model(images, hidden=False)
    assert values.shape == (6,)
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(mae_folder, norm_pix_loss=True, mask_ratio=0.75)
    torch.manual_seed(1)
    output = theirs((images.expand(-1, 3, -1, -1) - 0.4) / 0.3)
    torch.testing.assert_close(values.mean(), output.loss)
    assert output.mask.sum(1).tolist() == [12.0] * 6


def test_hidden_state_is_that_of_the_plain_vit_on_the_whole_image(mae_folder, data):
    model = load_masked_images(f"hf:{mae_folder}", data=data, ratio=0.75).eval()
    images = data.train.images()[:6]
    _, hidden = model(images, masked=False)
    plain = transformers.ViTModel.from_pretrained(mae_folder, add_pooling_layer=False).eval()
    torch.testing.assert_close(hidden, plain((images.expand(-1, 3, -1, -1) - 0.4) / 0.3).last_hidden_state[:, 0])
    assert torch.equal(hidden, model(images, masked=True)[1])  # no masking of what is distilled


@pytest.mark.parametrize("kind", ["small", "hf"])
def test_decoder_learns_from_reconstruction_alone(kind, mae_folder, data):
    spec = "small:vit-p2-w16-d1" if kind == "small" else f"hf:{mae_folder}"
    model = load_masked_images(spec, data=data, ratio=0.75)
    decoder = model.decoder if kind == "small" else model.model.decoder
    values, hidden = model(data.train.images()[:6])
    assert_grads(values.mean(), to=[model.encoder, decoder])
    assert_grads(hidden.square().sum(-1).mean(), to=[model.encoder], not_to=[decoder])


def test_small_error_by_loops(data):
    torch.manual_seed(0)
    model = load_masked_images("small:vit-p2-w16-d1", data=data, ratio=0.75).double()
    images = data.train.images()[:3].double()
    torch.manual_seed(2)
    predicted, _, hidden = model.reconstruct(images)
    torch.manual_seed(2)
    values, _ = model(images, hidden=False)
    normalised = (images - data.mean[0]) / data.std[0]
    for i in range(3):
        errors = []
        for n in range(16):
            if hidden[i, n]:
                patch = normalised[i, 0, 2 * (n // 4) : 2 * (n // 4) + 2, 2 * (n % 4) : 2 * (n % 4) + 2].flatten()
                target = (patch - patch.mean()) / (patch.var(correction=1) + 1e-6).sqrt()
                errors.append(float((predicted[i, n] - target).detach().square().mean()))
        assert len(errors) == 12
        assert float(values[i].detach()) == pytest.approx(sum(errors) / 12, rel=1e-5)


@pytest.mark.parametrize("kind", ["small", "hf"])
def test_classifier_is_the_encoder_under_a_fresh_head(kind, mae_folder, data, tmp_path):
    spec = "small:vit-p2-w16-d1" if kind == "small" else f"hf:{mae_folder}"
    model = load_masked_images(spec, data=data, ratio=0.75).eval()
    images = data.train.images()[:5]
    classifier = model.classifier(7, dropout=0.3).eval()
    assert {m.p for m in classifier.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    head = classifier.head if kind == "small" else classifier.model.classifier
    torch.testing.assert_close(classifier(images), head(model(images, masked=False)[1]))
    assert not {id(p) for p in classifier.parameters()} & {id(p) for p in model.parameters()}
    save_classifier(classifier, tmp_path / "student")
    if kind == "hf":
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "student").eval()
        torch.testing.assert_close(again((images.expand(-1, 3, -1, -1) - 0.4) / 0.3).logits, classifier(images))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_text_error_is_transformers_own_and_hidden_is_unmasked(kind, tmp_path):
    model = load_masked_text(f"hf:{bert(tmp_path / kind, kind)}", ratio=0.3).eval()
    ids = model.tokenizer(["a b c d e f", "g h i", "j a a b c d"], padding=True, return_tensors="pt")["input_ids"]
    torch.manual_seed(3)
    values, hidden = model(ids)
    torch.manual_seed(3)
    shown, chosen = model.mask(ids)
    assert chosen.any()
    labels = ids.masked_fill(~chosen, -100)
    attention = (ids != model.tokenizer.pad_token_id).long()
    torch.testing.assert_close(values.mean(), model.model(input_ids=shown, attention_mask=attention, labels=labels).loss)
    torch.testing.assert_close(hidden, model.encoder(input_ids=ids, attention_mask=attention).last_hidden_state[:, 0])
    classifier = model.classifier(3, 0.1).eval()
    state, same = model.encoder.state_dict(), classifier.model.base_model.state_dict()
    assert all(torch.equal(state[name], same[name]) for name in state)
    classifier.save(tmp_path / "saved")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(again(input_ids=ids, attention_mask=attention).logits, classifier(ids))


def test_masking_of_tokens(tmp_path):
    model = load_masked_text(f"hf:{bert(tmp_path / 'bert')}", ratio=0.15)
    ids = torch.full((400, 50), 7)
    ids[:, 0], ids[:, 40], ids[:, 41:] = 2, 3, 0  # [CLS] ... [SEP] [PAD]
    torch.manual_seed(0)
    shown, chosen = model.mask(ids)
    open_ = ids == 7
    assert not chosen[~open_].any()
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert float(chosen[open_].float().mean()) == pytest.approx(0.15, abs=0.01)
    now = shown[chosen]
    assert float((now == 4).float().mean()) == pytest.approx(0.8 + 0.1 / 15, abs=0.02)
    assert float((now == 7).float().mean()) == pytest.approx(0.1 + 0.1 / 15, abs=0.02)
    assert model.mask(ids[:1, :3])[1].sum() >= 1  # a loss needs something to predict


def test_bad_models_are_named(tmp_path, data):
    load = lambda spec: load_masked_images(spec, data=data, ratio=0.75)
    for spec, message in (("small:convnet", "needs patches"), ("timm:vit", "names no model"), (f"hf:{bert(tmp_path / 'b')}", "is a bert")):
        with pytest.raises(UserError, match=message):
            load(spec)
    transformers.BertModel(
        transformers.BertConfig(**{"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2})
    ).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match="without its pre-training head"):
        load_masked_text(f"hf:{tmp_path / 'b'}", ratio=0.15)
    with pytest.raises(UserError, match="could not be loaded"):
        load_masked_text(f"hf:{tmp_path / 'none'}", ratio=0.15)
