"""A checkpoint from anywhere: nothing outside its folder is read, nothing that it brings is run."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import add_companions, make_checkpoint
from converting import tree

import molae
from molae import ConvertConfig, cli, convert
from molae.convert.destination import LOCK
from molae.convert.journal import JOURNAL
from molae.demo import CHECKPOINT
from molae.errors import CheckpointError, DestinationError, MolaeError
from molae.io import open_checkpoint

CONFIG = ConvertConfig(size=0.6, group_size=2)
PACKAGE = Path(molae.__file__).parent


@pytest.fixture
def source(tmp_path):
    src = make_checkpoint(tmp_path / "src", shards=2)
    add_companions(src)
    return src


@pytest.fixture
def secret(tmp_path):
    """A file of the user's that no checkpoint has to do with."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "secret").write_text("a key")
    return folder / "secret"


# ------------------------------------------------------------------------- links


@pytest.mark.parametrize(
    "name", ["LICENSE", "config.json", "model.safetensors.index.json",
             "model-00001-of-00002.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_folder(tmp_path, source, secret, name, relative):
    (source / name).rename(secret)
    link = os.path.relpath(secret, source) if relative else secret
    (source / name).symlink_to(link)
    with pytest.raises(CheckpointError, match=f"{name}: leads out of the checkpoint, to .*secret"):
        convert(source, tmp_path / "dst", CONFIG)
    assert not (tmp_path / "dst").exists() or not list((tmp_path / "dst").iterdir())


def test_a_linked_folder_within_an_index(tmp_path, source, secret):
    index = source / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    (source / "sub").symlink_to(secret.parent, target_is_directory=True)
    first = sorted(set(named["weight_map"].values()))[0]
    shutil.move(source / first, secret.parent / first)
    named["weight_map"] = {
        n: f"sub/{f}" if f == first else f for n, f in named["weight_map"].items()
    }
    index.write_text(json.dumps(named))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        open_checkpoint(source)


def test_templates_in_a_linked_folder(tmp_path, source, secret):
    (source / "additional_chat_templates").symlink_to(secret.parent, target_is_directory=True)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        convert(source, tmp_path / "dst", CONFIG)


def test_the_links_of_a_hub_cache_are_followed(tmp_path, source):
    convert(source, tmp_path / "wanted", CONFIG)
    repo = tmp_path / "models--org--name"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.copy2(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    convert(snapshot, tmp_path / "dst", CONFIG)
    made, wanted = tree(tmp_path / "dst"), tree(tmp_path / "wanted")
    del made["README.md"], wanted["README.md"]  # they name the source
    assert made == wanted
    # The cache may itself be reached by a link.
    (tmp_path / "cache").symlink_to(repo)
    assert open_checkpoint(tmp_path / "cache" / "snapshots" / "0123abc").tensors
    # But it is no way to elsewhere.
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to("../../../src/LICENSE")
    with pytest.raises(CheckpointError, match="leads out"):
        convert(snapshot, tmp_path / "other", CONFIG)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_pipe_in_place_of_a_file_is_no_hang(source, name):
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(CheckpointError, match=f"{name}: is no ordinary file"):
        open_checkpoint(source)


@pytest.mark.parametrize("name", [JOURNAL, LOCK, "model-00001-of-00002.safetensors", "LICENSE"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_prepared_with_links(tmp_path, source, secret, name, overwrite):
    """Refused, or the link itself is replaced: what it leads to stays as it was."""
    dst = tmp_path / "dst"
    convert(source, dst, CONFIG)
    (dst / name).unlink(missing_ok=True)
    (dst / name).symlink_to(secret)
    try:
        convert(source, dst, CONFIG, overwrite=overwrite)
    except DestinationError as error:
        assert str(dst) in str(error)  # noqa: PT017 (going through is right too)
    assert secret.read_text() == "a key"


WATCH = """
import os, sys
seen = []
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        flags = args[2] if isinstance(args[2], int) else 0
        seen.append((os.fsdecode(args[0]), bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))))
    elif event in ("os.rename", "os.remove", "os.mkdir", "shutil.copyfile"):
        seen.append((os.fsdecode(args[0]), True))
sys.addaudithook(watch)
from molae import cli
code = cli.main(sys.argv[2:])
with open(sys.argv[1], "w") as out:
    for path, written in seen:
        print(int(written), os.path.abspath(path), file=out)
sys.exit(code)
"""


def test_what_a_conversion_opens(tmp_path, source):
    """By the interpreter's own audit: it writes below DST alone, and reads of ours SRC alone."""
    dst, log = tmp_path / "dst", tmp_path / "log"
    argv = ["convert", source, dst, "--size", "0.6", "--group-size", "2", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCH, str(log), *map(str, argv)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    written = {path for flag, path in lines if flag == "1" and path != str(log)}
    assert written
    strays = [p for p in written if not Path(p).is_relative_to(dst) and p != "/dev/null"]
    assert not strays
    ours = {path for _, path in lines if Path(path).is_relative_to(tmp_path) and path != str(log)}
    assert all(Path(p).is_relative_to(dst) or Path(p).is_relative_to(source) for p in ours)


# -------------------------------------------------------------------------- code


@pytest.fixture
def armed(tmp_path):
    """The demonstration checkpoint with code beside it that would leave a trace."""
    pytest.importorskip("transformers")
    folder = tmp_path / "armed"
    shutil.copytree(CHECKPOINT, folder)
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w').write('run')\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (folder / name).write_text(code)
    _entries(
        folder / "config.json",
        auto_map={
            "AutoConfig": "configuration_x.X",
            "AutoModelForCausalLM": "modeling_x.X",
            "AutoModel": "modeling_x.X",
        },
    )
    _entries(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]},
    )
    return folder, trace


def _entries(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _commands(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The experts of a layer read what the router sends them. " * 8)
    yield ["inspect", folder]
    yield ["convert", folder, tmp_path / "free", "--size", "0.6", "--quiet"]
    yield ["eval", folder, "--text", text, "--window", "64", "--quiet"]
    yield ["generate", folder, "The", "--max-new-tokens", "2"]


def test_code_that_comes_with_a_checkpoint_is_never_run(armed, tmp_path, capsys, one_thread):
    from molae.hf.calibrate import Calibration

    folder, trace = armed
    for argv in _commands(folder, tmp_path):
        code = cli.main([str(arg) for arg in argv])
        err = capsys.readouterr().err
        assert code in (0, 1), (argv, err)
        assert "--debug shows" not in err
        assert not trace.exists(), argv
    with Calibration(folder, "The experts of a layer. " * 100, sequences=1, length=64):
        pass
    assert not trace.exists()


def test_an_unknown_model_that_brings_its_code_is_refused(armed, tmp_path, capsys, one_thread):
    from molae.hf.opening import open_model

    folder, trace = armed
    _entries(folder / "config.json", model_type="unheard_of")
    for argv in _commands(folder, tmp_path):
        assert cli.main([str(arg) for arg in argv]) == 1
        assert "--debug shows" not in capsys.readouterr().err, argv
    with pytest.raises(MolaeError):
        open_model(folder)
    assert not trace.exists()


def test_a_pickle_is_never_loaded(armed, tmp_path):
    from molae.hf.opening import open_model

    folder, trace = armed

    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="safetensors"):
        open_model(folder)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin; save the model as safetensors"):
        open_checkpoint(folder)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
def test_kernels_of_the_hub_are_refused(armed, name):
    from molae.hf.opening import open_model
    from molae.hf.shapes import tensors_of
    from molae.io import read_config

    folder, _ = armed
    _entries(folder / "config.json", **{name: "someone/kernel"})
    with pytest.raises(CheckpointError, match=f"{name} 'someone/kernel' names code"):
        open_model(folder)
    with pytest.raises(CheckpointError, match="names code"):
        tensors_of(read_config(folder / "config.json"))


def test_an_adapter_whose_base_is_elsewhere(armed, tmp_path):
    from molae.hf.opening import open_model

    folder, _ = armed
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "elsewhere"), "peft_type": "LORA"})
    )
    with pytest.raises(CheckpointError, match="holds an adapter"):
        open_model(folder)


def _loading_faults(text):
    """Calls that could run what a file brings."""
    needed = {
        "from_pretrained": ("trust_remote_code", False),
        "from_config": ("trust_remote_code", False),
        "torch.load": ("weights_only", True),
        "np.load": ("allow_pickle", False),
    }
    faults = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            faults += [n for n in names if n.split(".")[0] in ("pickle", "dill", "joblib")]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        for wanted, (keyword, value) in needed.items():
            if name == wanted or ("." not in wanted and name.endswith(f".{wanted}")):
                given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if given.get(keyword) is not value:
                    faults.append(f"{name} at line {node.lineno} without {keyword}={value}")
        if name in ("eval", "exec"):
            faults.append(f"{name} at line {node.lineno}")
    return faults


def test_no_call_of_molaes_loads_code_or_pickles():
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 80
    faults = {p: f for p in sources if (f := _loading_faults(p.read_text("utf-8")))}
    # A worker tries whether its own error can be sent; the scheduler's protocol is pickles.
    assert faults == {PACKAGE / "cluster" / "worker.py": ["pickle"]}
    for bad in (
        "import pickle", "from joblib import load", "torch.load(x)", "np.load(x)", "eval(x)",
        "np.load(x, allow_pickle=True)", "AutoModel.from_pretrained(x)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "AutoModel.from_config(x)",
    ):  # fmt: skip
        assert _loading_faults(bad), bad
