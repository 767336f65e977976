//! Writer of the cpio `newc` format, which the kernel reads as an initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Times and owners are zero, so
//! equal input gives equal bytes.

use std::collections::BTreeSet;

/// An archive under construction.
#[derive(Default)]
pub struct Cpio {
    out: Vec<u8>,
    ino: u32,
    dirs: BTreeSet<String>,
}

impl Cpio {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and its parents. `name` is relative, without a leading slash.
    pub fn dir(&mut self, name: &str) {
        if name.is_empty() || !self.dirs.insert(name.to_owned()) {
            return;
        }
        self.parents(name);
        self.entry(name, 0o040_755, (0, 0), &[]);
    }

    /// Adds a regular file with its parents; `mode` holds the permission bits only.
    pub fn file(&mut self, name: &str, mode: u32, data: &[u8]) {
        self.parents(name);
        self.entry(name, 0o100_000 | mode, (0, 0), data);
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) {
        self.parents(name);
        self.entry(name, 0o120_777, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub fn chardev(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.parents(name);
        self.entry(name, 0o020_000 | mode, (major, minor), &[]);
    }

    /// Closes the archive and returns its bytes, padded to 512 so that another may follow.
    pub fn finish(mut self) -> Vec<u8> {
        self.ino = u32::MAX;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.pad(512);
        self.out
    }

    fn parents(&mut self, name: &str) {
        if let Some((parent, _)) = name.rsplit_once('/') {
            self.dir(parent);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, rdev: (u32, u32), data: &[u8]) {
        self.ino = self.ino.wrapping_add(1);
        let nlink = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        // Sizes come from files that we made or fetched, far below the format's 4 GiB.
        let size = u32::try_from(data.len()).expect("initramfs member below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("short name");
        let fields = [self.ino, mode, 0, 0, nlink, 0, size, 0, 0, rdev.0, rdev.1, name_size, 0];
        self.out.extend_from_slice(b"070701");
        for field in fields {
            self.out.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.out.extend_from_slice(name.as_bytes());
        self.out.push(0);
        self.pad(4);
        self.out.extend_from_slice(data);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        let len = self.out.len().next_multiple_of(to);
        self.out.resize(len, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Cpio;

    #[test]
    fn busybox_reads_what_we_write() {
        let mut cpio = Cpio::new();
        cpio.file("a/b/c", 0o644, b"hello");
        cpio.symlink("a/l", "b/c");
        cpio.chardev("dev/null", 0o666, 1, 3);
        let bytes = cpio.finish();
        assert_eq!(bytes.len() % 512, 0);
        // Header: magic, then 13 fields of 8 hex digits; the first member is the directory "a".
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[110..112], b"a\0");
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("hello"));
        assert!(text.contains("TRAILER!!!"));
    }
}
