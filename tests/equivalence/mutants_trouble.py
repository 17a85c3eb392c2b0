"""Planted mistakes in how commands end, in what a conversion leaves, and in what specs may ask for."""

from __future__ import annotations

from mutant import RUNTIME, Mutant

CONSOLE = "qwenspec/commands/console.py"
INTERRUPT = "qwenspec/commands/interrupt.py"
MACHINE = f"{RUNTIME}/machine.py"
PACKAGE_CONSOLE = f"{RUNTIME}/console.py"
CONVERT = "qwenspec/convert/convert.py"
PARTIAL = "qwenspec/convert/partial.py"
SOURCE = "qwenspec/source.py"
SHARES = "qwenspec/ir/shares.py"

TROUBLE = ("tests/unit/test_trouble.py",)
CONVERSION = ("tests/unit/test_convert.py",)
ON_DISK = ("tests/unit/test_convert_disk.py",)
INTERRUPTED = ("tests/unit/test_convert_interrupted.py",)

TROUBLE_MUTANTS = (
    Mutant(
        "a_full_disk_is_our_bug",
        MACHINE,
        "    if error.filename is None or isinstance(error.filename, int):\n        return reason",
        "    if error.filename is None or isinstance(error.filename, int):\n        return None",
        "an OSError of a stream has no file's name",
        tests=TROUBLE,
    ),
    Mutant(
        "no_memory_is_our_bug",
        MACHINE,
        "return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and",
        "return (isinstance(error, RuntimeError) and",
        "Python's and NumPy's own error",
        tests=TROUBLE,
    ),
    Mutant(
        "torch_without_memory_is_our_bug",
        MACHINE,
        "out.of.memory|allocate memory|",
        "out.of.memory|",
        "on CPUs torch says it in a RuntimeError",
        tests=TROUBLE,
    ),
    Mutant(
        "any_error_about_memory_is_the_machines",
        MACHINE,
        "(isinstance(error, RuntimeError) and bool(",
        "(isinstance(error, Exception) and bool(",
        "a bug that mentions memory is a bug",
        tests=TROUBLE,
    ),
    Mutant(
        "gib_are_bytes",
        MACHINE,
        "int(amount) / 2**30",
        "int(amount) / 2**20",
        "how much was asked for",
        tests=TROUBLE,
    ),
    Mutant(
        "trouble_ends_as_a_bug",
        CONSOLE,
        "return ExitCode.USAGE if problem else ExitCode.INTERNAL",
        "return ExitCode.INTERNAL",
        "the exit code does not depend on the traceback",
        tests=TROUBLE,
    ),
    Mutant(
        "an_interrupt_ends_as_a_mistake",
        CONSOLE,
        "        code = INTERRUPTED\n",
        "        code = ExitCode.USAGE\n",
        "a shell stops its loop at 130",
        tests=TROUBLE,
    ),
    Mutant(
        "characters_that_are_lacking_raise",
        CONSOLE,
        'stream.reconfigure(errors="backslashreplace")',
        'stream.reconfigure(errors="strict")',
        "show --ir in a Latin-1 terminal",
        tests=TROUBLE,
    ),
    Mutant(
        "json_escapes_as_python_does",
        CONSOLE,
        "ensure_ascii=not everything",
        "ensure_ascii=False",
        "backslashes of Python's are not JSON's",
        tests=TROUBLE,
    ),
    Mutant(
        "names_reach_the_terminal",
        CONSOLE,
        'print(paint("\\n".join(map(printable, text.split("\\n")))))',
        "print(paint(text))",
        "escape sequences in a family's name",
        tests=TROUBLE,
    ),
    Mutant(
        "progress_without_a_cursor",
        CONSOLE,
        'return stream.isatty() and os.environ.get("TERM") != "dumb"',
        "return stream.isatty()",
        "TERM=dumb",
        tests=TROUBLE,
    ),
    Mutant(
        "the_report_is_written_last",
        "qwenspec/commands/verify.py",
        """\
    if page is not None:  # before anything else can fail
        write_whole(page, report.page(result))
        console.note(f"wrote {page}")
    if as_json:
        console.show_json(result.to_data())
    else:
        console.show(report.table(result), _painted)
""",
        """\
    if as_json:
        console.show_json(result.to_data())
    else:
        console.show(report.table(result), _painted)
    if page is not None:
        write_whole(page, report.page(result))
        console.note(f"wrote {page}")
""",
        "an hour's work is lost to a terminal",
        tests=TROUBLE,
    ),
    Mutant(
        "no_memory_is_a_disagreement",
        "qwenspec/verify/session.py",
        "            if out_of_memory(error):  # the machine's trouble, whoever meets it\n                raise\n",
        "",
        "a failure's folder about nothing",
        tests=TROUBLE,
    ),
    Mutant(
        "no_memory_is_made_small",
        "qwenspec/verify/machine.py",
        "            raise OutOfMemory(error) from error\n",
        "            raise\n",
        "Hypothesis runs it again, many times",
        tests=TROUBLE,
    ),
    Mutant(
        "imports_swallow_interrupts",
        INTERRUPT,
        "        _insist(importing)\n",
        "        pass\n",
        "Ctrl-C while torch is imported",
        tests=TROUBLE,
    ),
    Mutant(
        "the_innermost_import_is_interrupted",
        INTERRUPT,
        "            found = frame\n",
        "            found = found or frame\n",
        "what imports it swallows the interrupt too",
        tests=TROUBLE,
    ),
    Mutant(
        "interrupts_that_are_ignored_count",
        INTERRUPT,
        "if signal.getsignal(signal.SIGINT) is signal.default_int_handler:",
        "if True:",
        "nohup and background jobs",
        tests=TROUBLE,
    ),
    Mutant(
        "importing_packages_catch_interrupts",
        PACKAGE_CONSOLE,
        "        signal.signal(signal.SIGINT, signal.SIG_DFL)\n",
        "        pass\n",
        "a library swallows Ctrl-C while a package imports it",
        tests=TROUBLE,
    ),
    Mutant(
        "a_module_of_the_package_catches_interrupts",
        PACKAGE_CONSOLE,
        """f"{word.removeprefix('-m')}.".startswith(f"{package}.") for""",
        "word.removeprefix('-m') == package for",
        "python -m package.build imports the package too",
        tests=TROUBLE,
    ),
    Mutant(
        "an_option_beside_its_module_catches_interrupts",
        PACKAGE_CONSOLE,
        "word.removeprefix('-m')",
        "word",
        "python -mpackage, without a space",
        tests=TROUBLE,
    ),
    Mutant(
        "whoever_imports_a_package_dies_of_ctrl_c",
        PACKAGE_CONSOLE,
        "    if running and signal.getsignal(",
        "    if signal.getsignal(",
        "a server that imports the package handles Ctrl-C itself",
        tests=TROUBLE,
    ),
    Mutant(
        "ignored_interrupts_end_a_package",
        PACKAGE_CONSOLE,
        "if running and signal.getsignal(signal.SIGINT) is signal.default_int_handler:",
        "if running:",
        "nohup and background jobs",
        tests=TROUBLE,
    ),
    Mutant(
        "a_running_package_dies_of_ctrl_c",
        PACKAGE_CONSOLE,
        "        signal.signal(signal.SIGINT, signal.default_int_handler)\n",
        "        pass\n",
        "nothing is tidied up, and the exit code is not 130",
        tests=TROUBLE,
    ),
    Mutant(
        "triton_package_catches_interrupts_of_imports",
        "backends/qwenspec_triton/templates/__init__.py.jinja",
        "die_of_ctrl_c(__name__)\n",
        "",
        "it must be said before torch is imported",
        tests=TROUBLE,
    ),
    Mutant(
        "tvm_package_catches_interrupts_of_imports",
        "backends/qwenspec_tvm/templates/__init__.py.jinja",
        "die_of_ctrl_c(__name__)\n",
        "",
        "it must be said before TVM is imported",
        tests=TROUBLE,
    ),
    Mutant(
        "names_before_what_they_name",
        PARTIAL,
        "    _keep(begun)\n",
        "",
        "a machine that stops leaves an empty config.json",
        tests=ON_DISK,
    ),
    Mutant(
        "copied_files_are_not_on_the_disk",
        PARTIAL,
        '        for file in self.folder.rglob("*"):\n            _keep(file)\n',
        "",
        "a machine that stops leaves an empty tokenizer",
        tests=ON_DISK,
    ),
    Mutant(
        "files_of_folders_are_not_on_the_disk",
        PARTIAL,
        '        for file in self.folder.rglob("*"):',
        '        for file in self.folder.glob("*"):',
        "chat templates are in a folder of theirs",
        tests=ON_DISK,
    ),
    Mutant(
        "conversion_that_only_began_is_foreign",
        PARTIAL,
        "<= {LOCK, STATE + WRITING}",
        "<= {LOCK}",
        "killed before its first rename",
        tests=INTERRUPTED,
    ),
    Mutant(
        "conversion_forgets_what_is_finished",
        PARTIAL,
        "            if tensor in whole:\n",
        "            if tensor not in whole:\n",
        "an interrupted run goes on with what is not finished",
        tests=INTERRUPTED,
    ),
    Mutant(
        "conversion_without_a_lock",
        PARTIAL,
        "            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "",
        "two conversions into one folder",
        tests=INTERRUPTED,
    ),
    Mutant(
        "conversion_stopped_at_its_end_is_complete",
        PARTIAL,
        "    return out.is_dir() and any(out.iterdir()) and not (out / STATE).is_file()",
        "    return out.is_dir() and any(out.iterdir())",
        "killed after the folder got its name",
        tests=INTERRUPTED,
    ),
    Mutant(
        "a_late_conversion_goes_on",
        PARTIAL,
        "        elif self.out.is_dir() and any(self.out.iterdir()):  # another process was quicker",
        "        elif False:",
        "it finds out when all is done",
        tests=INTERRUPTED,
    ),
    Mutant(
        "state_removed_before_it_has_its_name",
        PARTIAL,
        "        self.folder.replace(self.out)\n",
        "        (self.folder / STATE).unlink()\n        self.folder.replace(self.out)\n",
        "killed between the two: nobody knows what it is",
        tests=INTERRUPTED,
    ),
    Mutant(
        "spec_of_before_is_copied",
        CONVERT,
        '        (partial.folder / SPEC).write_text(_spec_text(request), encoding="utf-8")\n',
        '        shutil.copyfile(request.folder / "spec.yaml", partial.folder / SPEC)\n',
        "it does not fit the quantised checkpoint",
        tests=CONVERSION,
    ),
    Mutant(
        "links_lead_anywhere",
        CONVERT,
        "        if not _belongs(file, folder):\n",
        "        if False:\n",
        "notes.txt is a link to /etc/shadow",
        tests=CONVERSION,
    ),
    Mutant(
        "links_of_the_cache_are_left_out",
        CONVERT,
        "    return content.is_relative_to(folder) or content.parent == blobs",
        "    return content.is_relative_to(folder)",
        "every file of Hugging Face's cache is a link",
        tests=CONVERSION,
    ),
    Mutant(
        "any_file_is_quoted",
        SOURCE,
        '        if wanted_by and not os.path.realpath(name).endswith((".yaml", ".yml")):',
        '        if wanted_by and not name.endswith((".yaml", ".yml")):',
        "a link called .yaml to a file with secrets",
        tests=("tests/unit/test_source.py",),
    ),
    Mutant(
        "divisors_by_counting",
        SHARES,
        "    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]",
        "    small = [divisor for divisor in range(1, math.isqrt(number)) if number % divisor == 0]",
        "the root of a square is a divisor",
        tests=("tests/unit/test_ir_shard.py",),
    ),
)
