"""``.json``: a program read back is the program, and a file that is none is refused without running anything."""

import builtins
import copy
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, UpdateProgram, compile_optimizer
from gtddp_compile.passes.p12_emit import Emitted, emit
from gtddp_compile.runtime import compiler
from gtddp_compile.tools.export import document, targets
from gtddp_compile.tools.export.document import FORMAT, from_json
from support.architectures import EXAMPLES, Example
from support.exported import largest, named, targets_for
from support.networks import make
from support.schema import schema
from support.stored import SETTINGS, compiled, small

MUTANTS = 400


@pytest.mark.parametrize("name", [*EXAMPLES, *SETTINGS])
def test_round_trip(name: str, tmp_path: Path) -> None:
    """The same code, byte for byte; the same derivation, graph and table; the same valid file again."""
    options = SETTINGS.get(name, {})
    example = EXAMPLES[name]() if name in EXAMPLES else small()
    if name == "dict_output":
        options = {"loss": summed}
    program = compiled(example, **options).program
    program.export(tmp_path / "first.json")
    loaded = UpdateProgram.load(tmp_path / "first.json")
    assert loaded.code == program.code
    assert str(loaded) == str(program) and str(loaded.graph) == str(program.graph)
    assert loaded.derivation() == program.derivation() and loaded.cost() == program.cost()
    assert loaded.options == program.options
    loaded.export(tmp_path / "second.json")
    written = (tmp_path / "second.json").read_bytes()
    assert written == (tmp_path / "first.json").read_bytes()
    jsonschema.Draft202012Validator(schema()).validate(json.loads(written))


def test_what_torch_does_not_list_as_an_operation(tmp_path: Path) -> None:
    """Attention's heads by ``unflatten``, a cell's first state by ``new_zeros``, a hard activation, a weight's norm."""
    model = make(lambda net, x: net.out(nn.functional.hardswish(net.cell(net.attend(x, x, x)[0][:, 0]))), out=(4, 3))
    model.attend, model.cell = nn.MultiheadAttention(4, 2, batch_first=True).double(), nn.GRUCell(4, 4).double()
    nn.utils.parametrizations.weight_norm(model.out)
    program = compiled(Example(model, (torch.randn(3, 2, 4, dtype=torch.float64),))).program
    program.export(tmp_path / "program.json")
    assert UpdateProgram.load(tmp_path / "program.json").code == program.code


def summed(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["logits"], targets, reduction="none") + outputs["value"].square().sum(1)


@pytest.mark.parametrize("name", ["densenet_like", "attention_block", "dropout_mlp"])
def test_trains_as_the_original(name: str, tmp_path: Path) -> None:
    example, again = EXAMPLES[name](), EXAMPLES[name]()
    opt = compiled(example, weight_decay=0.01)
    opt.param_groups[0]["lr"] = 0.005
    opt.program.export(tmp_path / "program.json")
    other = compile_optimizer(again.model, program=UpdateProgram.load(tmp_path / "program.json"))
    assert other.program.code == opt.program.code
    for seed in range(3):
        for which, inputs in ((opt, example.inputs), (other, again.inputs)):
            torch.manual_seed(seed)
            which.step(inputs, targets_for(3, 4))
    assert largest(named(example.model)[0], named(again.model)[0]) == 0
    assert largest(named(example.model)[1], named(again.model)[1]) == 0


def test_a_loss_of_ones_own_is_given_again(tmp_path: Path) -> None:
    example, again = EXAMPLES["dict_output"](), EXAMPLES["dict_output"]()
    opt = compiled(example, loss=summed)
    opt.program.export(tmp_path / "program.json")
    program = UpdateProgram.load(tmp_path / "program.json")
    with pytest.raises(CompileError, match=r"only the name of its loss, summed. Give it: compile_optimizer"):
        compile_optimizer(again.model, program=program)
    with pytest.raises(CompileError, match="only the name of its loss, summed"):
        program.export(tmp_path / "step.py")
    other = compile_optimizer(again.model, program=program, loss=summed)
    assert opt.step(example.inputs, targets_for(3, 4)) == other.step(again.inputs, targets_for(3, 4))
    assert largest(named(example.model)[0], named(again.model)[0]) == 0


def two_layers(width: int = 5, act: Callable[[Tensor], Tensor] = torch.tanh, *, extra: bool = False) -> Example:
    layers: dict[str, Any] = {"a": (4, width), "b": (width, 3)}
    if extra:
        layers["c"] = (4, 3)
    model = make(lambda net, x: net.b(act(net.a(x))) + (net.c(x) if extra else 0), **layers)
    return Example(model, (torch.randn(4, 4, dtype=torch.float64),))


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shape": (lambda: two_layers(6).model, r"'a.(weight|bias)' has shape \(5.*\), the model's \(6"),
    "more": (lambda: two_layers(extra=True).model, r"the model has a parameter 'c\.\w+', the program has none"),
    "operation": (
        lambda: two_layers(act=torch.relu).model,
        r"operation relu, at test_export_json.py:\d+: the program has tanh",
    ),
    "frozen": (lambda: _frozen(), r"'a.weight' is trained in the program and frozen in the model"),
}


def _frozen() -> nn.Module:
    model = two_layers().model
    model.a.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", MISFITS)
def test_says_where_it_does_not_fit(name: str, tmp_path: Path) -> None:
    compiled(two_layers()).program.export(tmp_path / "program.json")
    program = UpdateProgram.load(tmp_path / "program.json")
    make_model, message = MISFITS[name]
    with pytest.raises(CompileError, match=message):
        compile_optimizer(make_model(), program=program)


def test_options_beside_a_program_are_refused(tmp_path: Path) -> None:
    program = compiled(two_layers()).program
    for options in ({"lr": 0.1}, {"coupling": "block"}, {"curvature": "adam"}):
        with pytest.raises(CompileError, match="options were given beside the program"):
            compile_optimizer(two_layers().model, program=program, **options)
    with pytest.raises(CompileError, match="the loss MSELoss is a sum over samples, the program's a mean"):
        compile_optimizer(two_layers().model, program=program, loss=nn.MSELoss(reduction="sum"))


# --- files that are none ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("program") / "program.json"
    compiled(EXAMPLES["dropout_mlp"](), loss=SETTINGS["loss"]["loss"]).program.export(path)
    return path.read_bytes()


def resealed(document_: dict[str, Any]) -> bytes:
    """With a checksum that is right: what a careful forger would write."""
    body = {key: document_[key] for key in ("tensors", "program")}
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True)
    return json.dumps({**document_, "checksum": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"}).encode()


def test_the_checksum_is_of_the_content_not_of_the_layout(content: bytes) -> None:
    assert resealed(json.loads(content)) == json.dumps(json.loads(content)).encode()
    from_json(json.dumps(json.loads(content), indent=7).encode())


def test_changed_files_are_refused(content: bytes) -> None:
    changed = json.loads(content)
    options = changed["program"]["groups"][0]["Group"]["options"]["dict"]
    next(pair for pair in options if pair[0] == "lr")[1] = 10.0
    with pytest.raises(CompileError, match="changed or damaged after it was written"):
        from_json(json.dumps(changed).encode())
    from_json(resealed(changed))


def test_programs_that_come_out_otherwise_are_refused(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose network, options or compiler make other equations or other code than where it was written."""
    other = json.loads(content)
    other["program"]["options"]["Options"]["feedback"] = False
    with pytest.raises(CompileError, match=r"give other equations here .* by 'gtddp_compile \S+, torch \S+'"):
        from_json(resealed(other))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "emit", lambda lowered: Emitted(emit(lowered).code.replace("B", "A"), {}))
        with pytest.raises(CompileError, match=r"give other code here"):
            from_json(content)
    from_json(content)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_cut_off_files_are_refused(content: bytes, part: float) -> None:
    with pytest.raises(CompileError, match="it is cut off or no JSON"):
        from_json(content[: int(len(content) * part)].rstrip()[:-1])


def test_newer_files_are_refused(content: bytes) -> None:
    newer = {**json.loads(content), "version": document.SCHEMA_VERSION + 1, "written_by": "gtddp_compile 9.1"}
    with pytest.raises(CompileError, match=r"version 3 and was written by 'gtddp_compile 9.1'.* Update gtddp_compile"):
        from_json(json.dumps(newer).encode())


def test_other_files_are_refused() -> None:
    for other in (b"", b"[]", b"\xff\xfe", b'{"format": 3}', b"[" * 100_000, b"NaN", b"9" * 5000, b"import os"):
        with pytest.raises(CompileError, match="no update program"):
            from_json(other)
    with pytest.raises(CompileError, match="there is no version number"):
        from_json(json.dumps({"format": FORMAT, "version": True}).encode())


def ops(program: dict[str, Any]) -> list[dict[str, Any]]:
    return [op["Op"] for op in program["ops"]["OpGraph"]["ops"]]


def reading(target: str, *args: Any) -> Callable[[dict[str, Any]], None]:
    """The second operation made to call a function of the table on the first."""
    return lambda p: ops(p)[1].update(target={"function": target}, args=[{"ref": ops(p)[0]["name"]}, *args])


FORGERIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "function": reading("torch.load"),
    "eval": reading("eval"),
    "method": lambda p: ops(p)[1].update(target={"method": "__reduce__"}),
    "aten": lambda p: ops(p)[1].update(target={"aten": "aten.from_file.default"}),
    "getattr": reading("getattr", "__class__"),
    "keyword": lambda p: ops(p)[1].update(kwargs={"dict": [["x=__import__('os'), y", 1]]}),
    "name": lambda p: ops(p)[1].update(name='f"""\n    import os'),
    "reference": lambda p: ops(p)[2].update(args=[{"ref": "x\n    import os"}]),
    "module": lambda p: ops(p)[1].update(module="m\nimport os"),
    "network": lambda p: p.update(name='n"""\nimport os'),
    "parameter": lambda p: p["ops"]["OpGraph"]["parameters"][0]["ParameterInfo"].update(name='w"""'),
    "record": lambda p: p["ops"]["OpGraph"]["ops"].__setitem__(1, {"UpdateProgram": {}}),
    "method's name": lambda p: p.update(curvature={"Evil": {}}),
    "type": lambda p: ops(p)[1].update(shape=["4"]),
    "option": lambda p: p["groups"][0]["Group"].update(options={"dict": [["lr", "0.1"]]}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_programs_are_refused(content: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = json.loads(content)
    FORGERIES[name](forged["program"])
    _forbid_execution(monkeypatch, content)
    with pytest.raises(CompileError, match="no update program"):
        from_json(resealed(forged))


def _forbid_execution(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Whatever would run what was read fails the test."""
    from_json(content)  # typing evaluates the annotations of the package's own classes, once

    def forbidden(*args: Any, **kwargs: Any) -> None:
        pytest.fail("loading executed something")

    for owner, name in ((builtins, "exec"), (builtins, "eval"), (os, "system"), (torch, "load"), (torch.hub, "load")):
        monkeypatch.setattr(owner, name, forbidden)


def _spoil(value: Any, source: random.Random) -> Any:
    """One change somewhere inside: another type, another value, something missing, something twice."""
    if isinstance(value, dict) and value and source.random() < 0.85:
        key = source.choice(list(value))
        kind = source.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return {**value, f"{key}x": value[key]}
        return {**value, key: _spoil(value[key], source)}
    if isinstance(value, list) and value and source.random() < 0.85:
        index = source.randrange(len(value))
        kind = source.random()
        if kind < 0.1:
            return value[:index] + value[index + 1 :]
        if kind < 0.15:
            return [*value, value[index]]
        return [*value[:index], _spoil(value[index], source), *value[index + 1 :]]
    others = [
        None, True, -1, 2**70, 0.5, "", "torch.load", "__class__", "x y", [], {}, {"ref": "a"}, {"code": "exit()"},
    ]  # fmt: skip
    if isinstance(value, str):
        others += [value[:-1], value + "'", value + "\n", value.upper()]
    if isinstance(value, int):
        others += [value + 1, -value]
    return source.choice(others)


def _damage(content: bytes, source: random.Random) -> bytes:
    """Bytes flipped, cut out or put in."""
    data = bytearray(content)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data))
        kind = source.randrange(3)
        if kind == 0:
            data[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            del data[at : at + source.randint(1, 200)]
        else:
            data[at:at] = bytes(source.randrange(256) for _ in range(source.randint(1, 5)))
    return bytes(data)


def test_mutants(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged bytes, and forged content under a right checksum: nothing executed, every error the documented one."""
    source = random.Random(0)
    original = json.loads(content)
    _forbid_execution(monkeypatch, content)
    refused = 0
    for index in range(MUTANTS):
        if index % 2:
            mutant = _damage(content, source)
        else:
            part = source.choice(["program", "program", "program", "tensors"])
            mutant = resealed({**original, part: _spoil(original[part], source)})
        try:
            from_json(mutant)
        except CompileError as error:
            assert error.why and error.remedy
            refused += 1
    assert refused > MUTANTS * 0.6


def test_the_table_holds_computations_alone() -> None:
    table = targets.functions()
    reaching = ("load", "save", "compile", "hub.", "from_file", "jit", "seed", "set_", "import", "open", "exec", "eval")
    assert not [name for name in table if name.rpartition(".")[2].startswith(reaching)]
    assert targets.target_of("method", "numpy") is None and targets.target_of("method", "__class__") is None
    assert targets.target_of("aten", "aten.from_file.default") is None
    assert targets.target_of("aten", "aten.relu_.default") is None
    assert targets.target_of("function", "torch.nn.functional.relu") is None
    assert targets.target_of("function", "F.gelu") is nn.functional.gelu


@torch.library.custom_op("gtddp_compile_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, g: g * 2)


def test_functions_that_are_not_torchs_are_refused_when_written(tmp_path: Path) -> None:
    model = make(lambda net, x: net.b(double(net.a(x))), a=(4, 4), b=(4, 3))
    program = compiled(Example(model, (torch.randn(4, 4, dtype=torch.float64),))).program
    with pytest.raises(CompileError, match=r"which a stored program cannot name"):
        program.export(tmp_path / "program.json")
    assert not (tmp_path / "program.json").exists()


PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "program-schema.json"


def text() -> str:
    return json.dumps(schema(), indent=1) + "\n"


def test_the_published_schema_is_the_codes() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == text(), "write it again (CONTRIBUTING.md)"


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_every_record_is_closed(content: bytes) -> None:
    """A field too many, one missing or one of another type anywhere in a program is not valid."""
    document, source = json.loads(content), random.Random(0)
    validator = jsonschema.Draft202012Validator(schema())
    records = list(_records(document["program"], schema()["$defs"]["Stored"], schema()["$defs"]))
    assert len({name for name, _ in records}) > 6
    for _, path in source.sample(records, 20):
        for spoil in (lambda record: record.update(another=1), lambda record: record.pop(next(iter(record)))):
            spoiled = copy.deepcopy(document)
            record = spoiled["program"]
            for key in path:
                record = record[key]
            spoil(record)
            assert not validator.is_valid(spoiled), path
    assert not validator.is_valid({**document, "version": document["version"] + 1})


def _records(data: Any, kind: dict[str, Any], definitions: dict[str, Any], path: tuple[Any, ...] = ()) -> Any:
    """Name and place of every record, by the schema."""
    for option in kind.get("anyOf", [kind]):
        name = option.get("$ref", "").rpartition("/")[2]
        if name in ("tree", "target"):
            continue
        found = definitions[name] if name else option
        if isinstance(data, dict) and "properties" in found and set(data) <= set(found["properties"]):
            yield (name, path)
            for key, item in data.items():
                yield from _records(item, found["properties"][key], definitions, (*path, key))
        elif isinstance(data, dict) and isinstance(found.get("additionalProperties"), dict):
            for key, item in data.items():
                yield from _records(item, found["additionalProperties"], definitions, (*path, key))
        elif isinstance(data, list) and isinstance(found.get("items"), dict):
            for index, item in enumerate(data):
                yield from _records(item, found["items"], definitions, (*path, index))


if __name__ == "__main__":
    torch.set_num_threads(1)
    PUBLISHED.write_text(text(), encoding="utf-8")
