"""The Hub when it refuses, breaks off or is out of reach, and what comes back from it in a fresh process."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from hub_server import TOKEN, Repository, run_python, serve
from test_hub import RESULTS, TASKS, assert_same_tensors, files_in, make_model, predict

import peft_talora
from peft_talora import hub, make_image_processor, save_adapter

ONLINE = """
import json, os, shutil, sys, torch, peft_talora
from peft import PeftConfig, PeftModel

folder, images, output = sys.argv[1:]
images = torch.load(images)
said = {}

def attempt(name, function, *arguments, **keywords):
    try:
        said[name] = ["done", str(function(*arguments, **keywords))]
    except Exception as error:
        said[name] = [type(error).__name__, str(error)]

@torch.no_grad()
def predict(model):
    return dict(model(pixel_values=images).logits)

def push_by_peft():
    peft_talora.load(folder).push_to_hub("user/by_peft")

token = os.environ.pop("HF_TOKEN")
attempt("push without a token", peft_talora.push_to_hub, folder, "user/name")
attempt("push with a wrong token", peft_talora.push_to_hub, folder, "user/name", token="hf_wrong")
os.environ["HF_TOKEN"] = token
for status in (400, 503):
    attempt(f"push answered by {status}", peft_talora.push_to_hub, folder, f"user/answers-{status}")
attempt("push that breaks off", peft_talora.push_to_hub, folder, "user/name")
attempt("load what broke off", peft_talora.load, "user/name")
os.environ["HF_TOKEN"] = "hf_wrong"
attempt("load with a wrong token", peft_talora.load, "user/name")
os.environ.pop("HF_TOKEN")
attempt("load without a token", peft_talora.load, "user/name")
os.environ["HF_TOKEN"] = token
attempt("load what is absent", peft_talora.load, "user/absent")
attempt("push again", peft_talora.push_to_hub, folder, "user/name")
attempt("load an absent revision", peft_talora.load, "user/name", revision="v9")
attempt("load an absent revision's processor", peft_talora.load_image_processor, "user/name", revision="v9")

short = peft_talora.load("user/name")
copy = peft_talora.hub.fetch("user/name")
saved = json.loads((copy / "msam_config.json").read_text())
base = peft_talora.MSamModel.from_pretrained(
    copy / PeftConfig.from_pretrained("user/name").base_model_name_or_path, tasks=saved["tasks"]
)
long = PeftModel.from_pretrained(base, "user/name").eval()
processor = peft_talora.load_image_processor("user/name")
torch.save(
    {
        "short": predict(short),
        "long": predict(long),
        "states are equal": all(
            torch.equal(one, other)
            for one, other in zip(short.state_dict().values(), long.state_dict().values(), strict=True)
        ),
        "size": processor.pad_size["height"],
    },
    output,
)
attempt("push by PEFT", push_by_peft)
attempt("load what PEFT pushed", peft_talora.load, "user/by_peft")
print(json.dumps(said))
"""

OFFLINE = """
import json, sys, torch, peft_talora

folder, images, output = sys.argv[1:]
with torch.no_grad():
    torch.save(dict(peft_talora.load("user/name")(pixel_values=torch.load(images)).logits), output)
said = {}
for name, function in {
    "load": lambda: peft_talora.load("user/absent"),
    "push": lambda: peft_talora.push_to_hub(folder, "user/name"),
}.items():
    try:
        function()
    except OSError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def visit(sam_folder, tmp_path_factory):
    """One process with a Hub that refuses and breaks off, and then one without a network; what both said and made."""
    tmp_path = tmp_path_factory.mktemp("hub")
    folder, images = tmp_path / "run", torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    shutil.copytree(sam_folder, folder / "base")
    model = make_model(str(folder / "base"))
    card = hub.model_card(model, RESULTS, "user/name")
    save_adapter(model, folder, make_image_processor(64), card)
    before = {name: (folder / name).read_bytes() for name in files_in(folder)}
    torch.save(images, tmp_path / "images.pt")
    with serve() as server:
        server.private, server.broken_commits = True, 1
        environment = server.environment(tmp_path / "home")
        online = run_python(ONLINE, folder, tmp_path / "images.pt", tmp_path / "online.pt", **environment)
    # The server is gone, but a process that is told so does not even try.
    environment["HF_HUB_OFFLINE"] = "1"
    offline = run_python(OFFLINE, folder, tmp_path / "images.pt", tmp_path / "offline.pt", **environment)
    return SimpleNamespace(
        expected=predict(model, images),
        card=card,
        before=before,
        after={name: (folder / name).read_bytes() for name in files_in(folder)},
        repositories=server.repositories,
        said=json.loads(online.splitlines()[-1]),
        online=torch.load(tmp_path / "online.pt"),
        said_offline=json.loads(offline.splitlines()[-1]),
        offline=torch.load(tmp_path / "offline.pt"),
    )


@pytest.mark.parametrize("doing", ["push", "load"])
@pytest.mark.parametrize("token", ["without a token", "with a wrong token"])
def test_401_names_the_repository_and_what_to_do(visit, doing, token):
    kind, message = visit.said[f"{doing} {token}"]
    assert kind == "OSError"
    assert message.startswith("user/name: the Hub answered 401: the access token is missing or wrong")
    assert "hf auth login" in message
    assert ("Invalid credentials" in message) is (token == "with a wrong token")  # the Hub got to see it
    assert TOKEN not in message


def test_404_names_the_repository(visit):
    kind, message = visit.said["load what is absent"]
    assert kind == "OSError"
    assert message.startswith("user/absent: the Hub answered 404: there is no such repository")


@pytest.mark.parametrize("what", ["load an absent revision", "load an absent revision's processor"])
def test_404_names_the_repository_of_a_revision(visit, what):
    kind, message = visit.said[what]
    assert kind == "OSError"
    assert message.startswith("user/name: the Hub answered 404: there is no such repository or revision")


@pytest.mark.parametrize(("status", "advice"), [(400, "the request was refused"), (503, "try again later")])
def test_only_a_server_s_own_failure_is_worth_another_try(visit, status, advice):
    kind, message = visit.said[f"push answered by {status}"]
    assert kind == "OSError"
    assert message.startswith(f"user/answers-{status}: the Hub answered {status}: {advice}")


def test_an_interrupted_upload_leaves_nothing_half_committed_and_can_be_repeated(visit):
    kind, message = visit.said["push that breaks off"]
    assert kind == "OSError"
    assert message.startswith("user/name: the Hub cannot be reached, or the connection was lost; try again")
    kind, message = visit.said["load what broke off"]
    assert kind == "OSError"
    assert "msam_config.json is missing" in message
    assert visit.said["push again"][0] == "done"
    assert set(visit.repositories["user/name"].files) - {".gitattributes"} == set(visit.before)
    assert visit.after == visit.before, "the local folder is as it was"


def test_what_comes_back_is_bit_for_bit_what_was_trained(visit):
    assert max(value.abs().max() for value in visit.expected.values()) > 0.1
    assert_same_tensors(visit.online["short"], visit.expected)
    assert visit.online["size"] == 64


def test_load_equals_the_long_way_by_stock_calls(visit):
    """The adapter's configuration, `MSamModel.from_pretrained` and `PeftModel.from_pretrained`."""
    assert_same_tensors(visit.online["long"], visit.online["short"])
    assert visit.online["states are equal"]


def test_offline_the_cached_copy_loads_and_another_one_is_named(visit):
    assert_same_tensors(visit.offline, visit.expected)
    assert visit.said_offline["load"].startswith("user/absent is no folder, and no repository of the Hub within reach")
    assert "HF_HUB_OFFLINE" in visit.said_offline["load"]
    assert visit.said_offline["push"].startswith("user/name: the Hub cannot be reached")


def test_trap_11_the_card_survives_push_to_hub(visit):
    assert visit.repositories["user/name"].files["README.md"].decode() == visit.card
    assert json.loads(visit.repositories["user/name"].files["msam_config.json"])["tasks"] == TASKS


def test_trap_11_pefts_own_push_to_hub_loses_the_card_and_the_heads(visit):
    """As the README says: it uploads PEFT's template for a card, and nothing that rebuilds the heads."""
    assert visit.said["push by PEFT"][0] == "done"
    files = visit.repositories["user/by_peft"].files
    assert set(files) - {".gitattributes"} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = files["README.md"].decode()
    assert "| depth | rmse |" not in card
    assert "peft_talora.load" not in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] in ("peft", "transformers")
    kind, message = visit.said["load what PEFT pushed"]
    assert kind == "OSError"
    assert "msam_config.json is missing" in message


def test_an_adapter_saved_without_its_image_processor_says_so(sam_folder, tmp_path):
    save_adapter(make_model(sam_folder), tmp_path)
    with pytest.raises(
        OSError, match=r"preprocessor_config\.json is missing: .* `make_image_processor\(image_size\)`"
    ):
        peft_talora.load_image_processor(tmp_path)


FETCH = """
import sys, peft_talora

for name in sys.argv[1:]:
    try:
        peft_talora.hub.fetch(name)
        print("fetched")
    except ValueError as error:
        print(error)
"""


@pytest.mark.parametrize("file", ["adapter_config.json", "msam_config.json"])
def test_a_base_outside_of_a_repository_is_refused(file, tmp_path):
    bases = ["base", "user/sam", "../base", "base/../../other", None]
    with serve() as server:
        for index, base in enumerate(bases):
            content = json.dumps({"base_model_name_or_path": base}).encode()
            server.repositories[f"user/a{index}"] = Repository({}, {file: content})
        names = [f"user/a{index}" for index in range(len(bases))]
        said = run_python(FETCH, *names, **server.environment(tmp_path / "home")).splitlines()
    refused = "user/a{}: the base checkpoint {!r} in {} leads out of the repository."
    wrong = [refused.format(index, bases[index], file) for index in (2, 3)]
    assert said == ["fetched", "fetched", *wrong, "fetched"]
