from tove_jax.files.compiled import LEAST, VARIABLE, keep_compiled


def test_the_folder_is_the_users_and_the_processors(tmp_path):
    folders = set()
    for flags in ("flags: sse avx", "flags: sse"):
        info = tmp_path / "cpuinfo"
        info.write_text(f"processor: 0\ncpu MHz: {len(flags)}\n{flags}\n" * 2)
        environment = {"XDG_CACHE_HOME": str(tmp_path)}
        keep_compiled(environment, info)
        folders.add(environment[VARIABLE])
    assert len(folders) == 2 and all(folder.startswith(str(tmp_path / "tove_jax")) for folder in folders)
    assert not list(tmp_path.glob("tove_jax"))  # JAX makes it


def test_what_is_set_stays_and_cpuinfo_may_lack(tmp_path):
    for told in ("", "/elsewhere"):
        environment = {VARIABLE: told}
        keep_compiled(environment)
        assert environment == {VARIABLE: told}
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    keep_compiled(environment, tmp_path / "none")
    assert environment[VARIABLE].startswith(str(tmp_path))


def test_short_programs_are_kept_unless_the_environment_says_otherwise(tmp_path):
    for environment, wanted in (({}, "0.1"), ({LEAST: "5"}, "5")):
        environment["XDG_CACHE_HOME"] = str(tmp_path)
        keep_compiled(environment)
        assert environment[LEAST] == wanted
