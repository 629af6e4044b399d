//! The memory of this process, where the system tells.

/// What is resident now, in MiB.
pub(crate) fn resident() -> Option<u64> {
    of_status("VmRSS:")
}

/// What was resident at most, in MiB.
pub(crate) fn peak() -> Option<u64> {
    of_status("VmHWM:")
}

fn of_status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let size = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = size.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes / 1024)
}
