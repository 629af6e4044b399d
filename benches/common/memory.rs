//! Memory of this process, where the system reports it.

/// Resident memory now, in MiB.
pub(crate) fn resident() -> Option<u64> {
    status_field("VmRSS:")
}

/// Peak resident memory, in MiB.
pub(crate) fn peak() -> Option<u64> {
    status_field("VmHWM:")
}

fn status_field(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let size = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: u64 = size.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes / 1024)
}
