"""Keys are made for hosts, read by nobody else, and added to; what is wrong is said with what to type."""

import os
import re
import shlex
import shutil
import socket
import ssl

import pytest
from typer.testing import CliRunner

import hotweights as hw
from hosts import free_address
from hotweights.cli import app
from hotweights.transfer.handed_keys import files_of
from hotweights.transfer.keys import Keys, make_keys

pytest.importorskip("cryptography")


def typed(advice):
    """Type what an error says to type."""
    command = re.search(r"hotweights (keys [^;]*)", advice)[1]
    return CliRunner().invoke(app, shlex.split(command))


def make(directory, hosts):
    result = CliRunner().invoke(app, ["keys", str(directory), "--hosts", hosts])
    assert result.exit_code == 0, result.output
    return result.output.split()


def test_keys_are_made_for_hosts_and_added_to(tmp_path):
    keys = tmp_path / "keys"
    assert [os.path.basename(path) for path in make(keys, "trainer,10.0.0.7")] == [
        *("ca.key", "ca.pem", "trainer.pem", "10.0.0.7.pem")
    ]
    assert {path.stat().st_mode & 0o777 for path in keys.iterdir()} == {0o600}
    assert keys.stat().st_mode & 0o777 == 0o700
    before = (keys / "trainer.pem").read_bytes()
    assert [os.path.basename(path) for path in make(keys, "gpu1")] == ["gpu1.pem"]
    assert (keys / "trainer.pem").read_bytes() == before
    assert isinstance(Keys(keys).connecting(["gpu1"]), ssl.SSLContext)


def test_who_has_no_keys_is_told_what_to_type(tmp_path):
    with pytest.raises(hw.UsageError, match="there are no keys") as told:
        hw.Receiver("tcps://trainer:1", keys=tmp_path / "my keys")
    assert typed(str(told.value)).exit_code == 0
    make(tmp_path / "my keys", "other")
    with pytest.raises(hw.UsageError, match=r"no key in .* is for this host, which is called 127.0.0.1") as told:
        hw.Sender("tcps://127.0.0.1:0", keys=tmp_path / "my keys")
    assert typed(str(told.value)).exit_code == 0
    hw.Sender("tcps://127.0.0.1:0", keys=tmp_path / "my keys").close()


def test_what_lacks_beside_keys_that_are_there_is_named(tmp_path):
    keys = tmp_path / "keys"
    make(keys, "127.0.0.1")
    (tmp_path / "bare").mkdir()
    shutil.copy(keys / "ca.pem", tmp_path / "bare")
    with pytest.raises(hw.UsageError, match=r"has ca\.pem, and no host's key; .* where ca\.key of the same job is"):
        hw.Receiver("tcps://127.0.0.1:1", keys=tmp_path / "bare")
    (keys / "ca.pem").rename(tmp_path / "ca.pem")
    for act in (lambda: hw.Receiver("tcps://127.0.0.1:1", keys=keys), lambda: make_keys(keys, ["127.0.0.1"])):
        with pytest.raises(hw.UsageError, match=r"ca\.pem is missing, beside keys for 127\.0\.0\.1; copy it"):
            act()
    shutil.copy(tmp_path / "ca.pem", keys)
    hw.Receiver("tcps://127.0.0.1:1", keys=keys).close()


def test_a_sender_listens_at_all_addresses_with_the_key_of_its_name(tmp_path):
    keys = tmp_path / "keys"
    with pytest.raises(hw.UsageError, match=r"0\.0\.0\.0:0 can be reached from other hosts") as told:
        hw.Sender("tcps://0.0.0.0:0")
    assert f"--hosts {socket.gethostname()};" in str(told.value)
    with pytest.raises(hw.UsageError, match=r"0\.0\.0\.0 is every address of a host"):
        make_keys(keys, ["0.0.0.0"])
    assert not keys.exists()
    make(keys, "localhost")
    assert Keys(keys).pick(["0.0.0.0"]) == "localhost"


def test_a_file_of_keys_is_no_directory_of_keys(tmp_path):
    make(tmp_path / "keys", "127.0.0.1")
    address = free_address()
    for end in (hw.Sender, hw.Receiver):
        with pytest.raises(hw.UsageError, match=r"ca\.pem is a file; give its folder: (.*)$") as told:
            end(address, keys=tmp_path / "keys" / "ca.pem")
        end(address, keys=str(told.value).rpartition(": ")[2]).close()
    with pytest.raises(hw.UsageError, match="is a file; give its folder"):
        files_of(tmp_path / "keys" / "ca.pem")


def test_the_only_key_is_taken_and_a_host_has_what_it_needs(tmp_path):
    make(tmp_path / "keys", "trainer,gpu1")
    for name in ("ca.key", "trainer.pem"):
        os.unlink(tmp_path / "keys" / name)
    Keys(tmp_path / "keys").connecting(["10.0.0.9"])


def test_hosts_are_listed_and_written_as_people_do(tmp_path):
    """Addresses are read in lower case; a host's own name may have capitals."""
    make(tmp_path / "keys", "Trainer, GPU1,fd00::1")
    assert Keys(tmp_path / "keys").pick(["trainer"]) == "Trainer"
    assert Keys(tmp_path / "keys").pick(["fd00::1"]) == "fd00::1"


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ("trainer", "has keys for trainer"),
        ("a b", "no names of hosts"),
        (",", "name at least one"),
        ("gpu1:7600", "no names of hosts: gpu1:7600; name them as in"),
        ("[::1]", "IPv6 without brackets"),
        ("CA", "ca is the authority's own name"),
    ],
)
def test_what_is_wrong_with_hosts_is_said(hosts, said, tmp_path):
    make(tmp_path / "keys", "trainer")
    result = CliRunner().invoke(app, ["keys", str(tmp_path / "keys"), "--hosts", hosts])
    assert result.exit_code == 2
    assert said in result.output


def test_without_the_authoritys_key_nobody_makes_more(tmp_path):
    make(tmp_path / "keys", "trainer")
    os.unlink(tmp_path / "keys" / "ca.key")
    result = CliRunner().invoke(app, ["keys", str(tmp_path / "keys"), "--hosts", "gpu1"])
    assert "is needed to make more keys" in result.output


def test_keys_that_others_can_read_or_that_are_broken_are_refused(tmp_path):
    make(tmp_path / "keys", "127.0.0.1")
    path = tmp_path / "keys" / "127.0.0.1.pem"
    path.chmod(0o644)
    with pytest.raises(hw.UsageError, match="everybody can read") as told:
        hw.Sender("tcps://127.0.0.1:0", keys=tmp_path / "keys")
    command = re.search(r"chmod 600 (.*)", str(told.value))
    os.chmod(shlex.split(command[1])[0], 0o600)
    hw.Sender("tcps://127.0.0.1:0", keys=tmp_path / "keys").close()
    path.write_text("broken")
    with pytest.raises(hw.UsageError, match=r"cannot be used: 127.0.0.1.pem"):
        hw.Sender("tcps://127.0.0.1:0", keys=tmp_path / "keys")
