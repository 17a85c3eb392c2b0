"""Planted mistakes in what a SPEC may be (variants' names, checkpoint folders, layouts), and in what is said of it."""

from __future__ import annotations

from mutant import Mutant

BUNDLED = "qwenspec/spec/bundled.py"
SPECS = "qwenspec/commands/specs.py"
LAYOUT = "qwenspec/spec/layout.py"
CHECK = "qwenspec/spec/check.py"
NAMES = ("tests/unit/test_names.py",)
LAYOUTS = ("tests/unit/test_spec_load.py", "tests/diagnostics/test_diagnostics.py")
COMMANDS = ("tests/unit/test_cli.py",)

NAMES_MUTANTS = (
    Mutant(
        "name_gives_the_default_variant",
        BUNDLED,
        'f"{PREFIX}{variants()[found]}#{found}"',
        'f"{PREFIX}{variants()[found]}"',
        "`run qwen3-8b` is the file's default variant, another model",
        tests=NAMES,
    ),
    Mutant(
        "name_wins_over_a_file",
        BUNDLED,
        "    if os.path.lexists(name) or os.path.lexists(file):\n        return name\n",
        "",
        "a file or folder of one's own that is called like a variant is ignored",
        tests=NAMES,
    ),
    Mutant(
        "any_variant_is_said_to_be_bundled",
        BUNDLED,
        'known = f"{mark}{variant}" if variants().get(variant) == base else ""',
        'known = f"{mark}{variant}"',
        "a hint that leads to the next error",
        tests=NAMES,
    ),
    Mutant(
        "no_variant_is_said_to_be_bundled",
        BUNDLED,
        'known = f"{mark}{variant}" if variants().get(variant) == base else ""',
        'known = ""',
        "the hint loses the variant that was asked for",
        tests=NAMES,
    ),
    Mutant(
        "bundled_file_has_a_path",
        "qwenspec/spec/files.py",
        "source.read(bundled.path_of(name), wanted_by), name)",
        "source.read(bundled.path_of(name), wanted_by), name)\n            name = bundled.path_of(name)",
        "generated code names the folder of the machine that wrote it",
        tests=NAMES,
    ),
    Mutant(
        "any_owner_is_the_hub",
        BUNDLED,
        '    if owner.lower() in ("", HUB) and',
        "    if",
        "somebody else's Qwen3-0.6B is taken for the original",
        tests=NAMES,
    ),
    Mutant(
        "option_loses_to_the_name",
        SPECS,
        "variant = chosen if variant is None else variant",
        "variant = variant if chosen is None else chosen",
        "`--variant` wins over the name",
        tests=NAMES,
    ),
    Mutant(
        "folder_is_named_by_its_config",
        SPECS,
        '"file": str(path)',
        '"file": str(path / CONFIG) if path.is_dir() else str(path)',
        "the command in generated code imports without the tensors, which tell what the model is",
        tests=NAMES,
    ),
    Mutant(
        "import_is_silent",
        SPECS,
        '    for remark in result.notes:\n        console.note(f"note: {remark}")\n',
        "",
        "what was assumed of a checkpoint is not said",
        tests=NAMES,
    ),
    Mutant(
        "folder_ignores_the_given_weights",
        SPECS,
        "    if weights is None:\n",
        "    if weights is None or _of_checkpoint(str(file)):\n",
        "`--weights` of a fine-tuned model beside the original's folder as SPEC",
        tests=NAMES,
    ),
    Mutant(
        "weights_may_be_nowhere",
        SPECS,
        "    if weights.is_dir():\n        return weights\n",
        "    if weights.is_dir() or not weights.exists():\n        return weights\n",
        "a folder that is not there is a tokenizer that is missing",
        tests=NAMES,
    ),
    Mutant(
        "layout_replaces_what_it_extends",
        LAYOUT,
        "    merged = merge(_named(base, trail), own)\n",
        "    merged = Mapping(_named(base, trail).entries | own.entries, own.location)  # type: ignore[union-attr]\n",
        "of a layout's mappings only what differs is kept",
        tests=LAYOUTS,
    ),
    Mutant(
        "layout_is_under_what_it_extends",
        LAYOUT,
        "merge(_named(base, trail), own)",
        "merge(own, _named(base, trail))",
        "the names that differ are lost: the original's tensors are read",
        tests=LAYOUTS,
    ),
    Mutant(
        "layouts_go_in_circles",
        LAYOUT,
        "    if real in trail:\n",
        "    if False:\n",
        "two layouts that extend one another",
        tests=LAYOUTS,
    ),
    Mutant(
        "layout_is_relative_to_the_current_folder",
        LAYOUT,
        "os.path.normpath(Path(node.location.file).parent / name)",
        "os.path.normpath(name)",
        "a layout beside the file that names it",
        tests=LAYOUTS,
    ),
    Mutant(
        "layout_in_the_spec_stays_partial",
        CHECK,
        "        merged, key = _replaced(merged, LAYOUT, layout), _key(merged, LAYOUT)\n",
        "        key = _key(merged, LAYOUT)\n",
        "names of a layout in the spec itself that extends another",
        tests=LAYOUTS,
    ),
    Mutant(
        "show_takes_any_context",
        "qwenspec/commands/describe.py",
        "    context = _context(model, context)\n    return {\n",
        "    context = context or min(USUAL_CONTEXT, model.max_position_embeddings)\n    return {\n",
        "`show` and `plan` say the same of a context beyond the model",
        tests=COMMANDS,
    ),
    Mutant(
        "absent_facts_are_null",
        "qwenspec/commands/compare.py",
        '{side: facts[path] for side, facts in (("a", before), ("b", after)) if path in facts}',
        '{side: facts.get(path) for side, facts in (("a", before), ("b", after))}',
        "a layer that only one model has seems to have a value",
        tests=COMMANDS,
    ),
    Mutant(
        "windows_lose_their_last_run",
        "qwenspec/backend/config.py",
        '    return " + ".join(terms + ([repr(tuple(apart))] if apart else []))\n',
        '    return " + ".join(terms)\n',
        "the last layer's window is missing where it alone slides",
        tests=("tests/unit/test_package_text.py",),
    ),
)
