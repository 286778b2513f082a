"""What a guest's memory really is, read by others than forkfs, and the comparison with a branch."""

from .guest import MIB

# Guest-physical ranges in which the machine answers with something else than RAM (VGA window and BIOS): a read by guest-physical
# address, as pmemsave is, does not see the RAM behind them.
NOT_RAM = ["0xa0000:0x100000"]


def foreign_command(case, guest, out, held=None):
    """The command line that reads the VMM's memory of the guest through /proc/PID/mem into a file.

    `held`: the path of a hold at a fault point; it waits until the hold is reached, and ends it when all is read.
    """
    command = [case.tool("foreign-read")]
    if held:
        command += ["--held", f"{held}.held", "--release", held]
    return command + [guest.pid, out, f"{guest.hva():#x}:{guest.mib * MIB}"]


def pmemsave(guest, out):
    """Save the guest's physical memory through the tests' own monitor."""
    guest.qmp.execute("pmemsave", val=0, size=guest.mib * MIB, filename=str(out))


def difference(case, truth, image, skip=()):
    """Empty when both files hold the same bytes, else a line that says where they differ."""
    result = case.run(case.tool("compare"), truth, image, *skip, check=False)
    assert result.code in (0, 1), f"compare {truth} {image}: {result.err.strip()}"
    return result.out.strip()
