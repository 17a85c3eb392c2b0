"""Planted mistakes in what is written: text that could become code, and files that somebody has or needs."""

from __future__ import annotations

from mutant import Mutant

QUOTING = "qwenspec/backend/quoting.py"
EMIT = "qwenspec/backend/emit.py"
PACKAGE = "qwenspec/backend/package.py"
FOLDER = "qwenspec/backend/folder.py"
FILES = "qwenspec/files.py"
CASE = "qwenspec/verify/case.py"
STORED = "qwenspec/verify/stored_failure.py"
POOL = "qwenspec/verify/rank_pool.py"

OF_TEXT = ("tests/unit/test_quoting.py",)
OF_FOLDERS = ("tests/unit/test_package_folder.py",)
OF_FILES = ("tests/unit/test_files.py",)
OF_PROCESSES = ("tests/unit/test_child_processes.py",)
OF_FAILURES = ("tests/unit/test_verify_failure.py",)

WRITING_MUTANTS = (
    Mutant(
        "banner_unescaped",
        EMIT,
        "# {comment(origin)} (sha256",
        "# {origin} (sha256",
        "a newline in a spec's path ends the comment, and what follows is code",
        tests=OF_TEXT,
    ),
    Mutant(
        "command_not_quoted",
        EMIT,
        "shlex.join(command)",
        "' '.join(command)",
        "the command in a package does not make it again where a path has a space",
        tests=OF_TEXT,
    ),
    Mutant(
        "comment_lets_returns_through",
        "qwenspec/diagnostics.py",
        'return char.isprintable() or unicodedata.category(char) == "Zs"',
        'return char.isprintable() or unicodedata.category(char) == "Zs" or char == "\\r"',
        "a carriage return ends a comment too",
        tests=OF_TEXT,
    ),
    Mutant(
        "quotes_end_a_docstring",
        QUOTING,
        """.replace('"', '\\\\"')""",
        "",
        "three quotes in a name end the docstring that has it",
        tests=OF_TEXT,
    ),
    Mutant(
        "name_as_it_is_in_templates",
        PACKAGE,
        '"variant": inside_quotes(model.name)',
        '"variant": model.name',
        "the same, where a template is given the name as it is",
        tests=OF_TEXT,
    ),
    Mutant(
        "name_of_a_spec_unchecked",
        "qwenspec/spec/document.py",
        "        if not names_a_variant(variant):\n",
        "        if not variant:\n",
        "a replayed spec names a folder anywhere",
        tests=OF_TEXT,
    ),
    Mutant(
        "unprintable_path_of_a_base",
        "qwenspec/spec/files.py",
        "        source.refuse_unprintable(name, wanted_by or Location(name, 0, 0))\n",
        "",
        "`extends` with a NUL is a ValueError",
        tests=OF_TEXT,
    ),
    Mutant(
        "index_replaced_in_dtypes",
        PACKAGE,
        "suffix: astuple(replace(tensor, name=named(tensor.name))) for",
        "suffix: astuple(replace(tensor, name=named(tensor.name), dtypes=tuple(map(named, tensor.dtypes)))) for",
        "of a layer F{i}, the dtype F16 becomes F{i}6",
        tests=OF_TEXT,
    ),
    Mutant(
        "foreign_files_dropped",
        FOLDER,
        "    for name in kept:\n",
        "    for name in ():\n",
        "my_server.py beside the generated files is gone",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "edited_stale_files_dropped",
        FOLDER,
        ", *sorted(stale & present.edited))",
        ",)",
        "a file of an older version, edited since, is gone",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "hashes_not_compared",
        FOLDER,
        "if hashlib.sha256(files[name]).hexdigest() != written[name]}",
        "if not written[name]}",
        "nobody is told that edits were replaced",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "links_inside_followed",
        FOLDER,
        "            if os.path.islink(os.path.join(folder, name)):\n                raise _link(Path(folder, name))\n",
        "            pass\n",
        "a cloned repository decides what is overwritten",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "linked_package_followed",
        FOLDER,
        "    if package.is_symlink():\n",
        "    if package is None:\n",
        "the package is written, and files removed, wherever a link leads",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "fifo_in_the_package_opened",
        FOLDER,
        "    if not stat.S_ISREG(os.lstat(file).st_mode):\n",
        "    if stat.S_ISDIR(os.lstat(file).st_mode):\n",
        "a fifo is read as a file",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "somebodys_file_overwritten",
        FOLDER,
        "(others & (files.keys() | above)) | (inside & files.keys())",
        "others & above",
        "a file that a new version would have, and somebody wrote",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "package_hides_a_module",
        FOLDER,
        " or (package and path.parent in modules):",
        ":",
        "Python imports somebody's folder in place of a generated module",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "new_version_in_steps",
        FOLDER,
        "        if not package.exists():\n            os.rename(beside, package)\n",
        "        if package.exists():\n            shutil.rmtree(package)\n            os.rename(beside, package)\n",
        "whoever is killed between leaves neither version",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "no_lock",
        FOLDER,
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "two processes that write one package remove each other's work",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "old_version_not_put_back",
        FOLDER,
        'if path.suffix != ".new" and not package.exists():',
        'if path.suffix != ".new" and package.is_fifo():',
        "a kill between two renames loses the package and what else was there",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "copy_not_put_back",
        FOLDER,
        "            shutil.copytree(path, package, dirs_exist_ok=True)\n",
        "            pass\n",
        "a kill while the old version is removed loses what else was there",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "rest_not_removed",
        FOLDER,
        "        shutil.rmtree(junk, ignore_errors=True)\n",
        "        pass\n",
        "every kill leaves a folder for good",
        tests=OF_FOLDERS,
    ),
    Mutant(
        "written_in_place",
        FILES,
        "        beside = file.with_name",
        "        file.unlink(missing_ok=True)\n        beside = file.with_name",
        "a full disk costs the edited spec",
        tests=OF_FILES,
    ),
    Mutant(
        "name_of_the_new_file_shared",
        FILES,
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL",
        "os.O_WRONLY | os.O_CREAT",
        "a link of that name is written through",
        tests=OF_FILES,
    ),
    Mutant(
        "half_a_file_left_beside",
        FILES,
        "            beside.unlink(missing_ok=True)\n",
        "            pass\n",
        "a full disk stays full",
        tests=OF_FILES,
    ),
    Mutant(
        "target_link_followed",
        FILES,
        "        if file.is_symlink():\n",
        "        if file.is_fifo():\n",
        "a link is replaced by a file, where it led is unclear",
        tests=OF_FILES,
    ),
    Mutant(
        "permissions_lost",
        FILES,
        "                    os.fchmod(handle, file.stat().st_mode & 0o777)\n",
        "                    pass\n",
        "a file that others may not read can be read",
        tests=OF_FILES,
    ),
    Mutant(
        "ranks_import_from_the_current_folder",
        POOL,
        '[sys.executable, "-P", "-m",',
        '[sys.executable, "-m",',
        "numpy.py lies in the current folder",
        tests=OF_PROCESSES,
    ),
    Mutant(
        "launcher_imports_from_the_current_folder",
        "qwenspec/commands/execute.py",
        '[sys.executable, "-P", "-m",',
        '[sys.executable, "-m",',
        "torch.py lies in the current folder",
        tests=OF_PROCESSES,
    ),
    Mutant(
        "path_taken_from_a_replay",
        CASE,
        '{"file", "options"} & stored.spec.keys()',
        '{"options"} & stored.spec.keys()',
        "a folder that is sent with a report decides what is written into generated files",
        tests=OF_FAILURES,
    ),
    Mutant(
        "rules_of_a_replayed_spec",
        STORED,
        "    for rule in RULES:\n",
        "    for rule in RULES[:0]:\n",
        "what no spec file may say",
        tests=OF_FAILURES,
    ),
    Mutant(
        "contenders_of_a_replay_unchecked",
        STORED,
        "    for name in case.packages:\n",
        "    for name in ():\n",
        "as many processes are started as a folder says",
        tests=OF_FAILURES,
    ),
    Mutant(
        "sizes_of_a_replay_unbounded",
        "qwenspec/verify/steps.py",
        "    if max(sizes.pages * sizes.page_size, sizes.chunk, sizes.max_batch_size) > MOST_TOKENS:\n",
        "    if sizes.chunk > MOST_TOKENS:\n",
        "a cache of 10^9 pages",
        tests=OF_FAILURES,
    ),
)
