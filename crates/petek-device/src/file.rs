//! A whole file mapped for reading: how weights get from disk to the packer without being held twice.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A read-only map of a file; clones share it.
#[derive(Clone, Debug)]
pub struct MappedFile {
    path: Arc<Path>,
    bytes: Bytes,
}

#[derive(Clone, Debug)]
enum Bytes {
    Mapped(Arc<memmap2::Mmap>),
    /// Embedded in the binary, which is mapped as it is.
    Embedded(&'static [u8]),
}

impl MappedFile {
    /// Maps `path` whole. An empty file is an error: there is nothing to map.
    ///
    /// *Errors*: the system's, with its kind kept and the path in front.
    pub fn open(path: impl Into<PathBuf>) -> io::Result<Self> {
        let path: PathBuf = path.into();
        let in_path = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let file = File::open(&path).map_err(in_path)?;
        let metadata = file.metadata().map_err(in_path)?;
        if !metadata.is_file() || metadata.len() == 0 {
            let what = if metadata.is_file() { "the file is empty" } else { "not a regular file" };
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display())));
        }
        // SAFETY: the map is private and read-only. The one hazard is another process that truncates or rewrites the file
        // while it is mapped: bytes would change (we only ever read plain numbers from them, and every length was checked
        // against the mapped length, not re-read from the file) or, if truncated, the process gets SIGBUS. Model files are
        // replaced, not edited in place, and a loader drops its maps once weights are packed.
        let map = unsafe { memmap2::MmapOptions::new().map_copy_read_only(&file) }.map_err(in_path)?;
        Ok(Self { path: path.into(), bytes: Bytes::Mapped(Arc::new(map)) })
    }

    /// A file that the binary carries in itself; `name` stands for its path.
    pub fn embedded(name: &str, bytes: &'static [u8]) -> Self {
        Self { path: Path::new(name).into(), bytes: Bytes::Embedded(bytes) }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Embedded(bytes) => bytes,
        }
    }

    /// Where it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells the system that the file is about to be read from front to back. A hint: failure is no error.
    pub fn will_read(&self) {
        if let Bytes::Mapped(map) = &self.bytes {
            let _ = map.advise(memmap2::Advice::Sequential);
            let _ = map.advise(memmap2::Advice::WillNeed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_bytes_and_refuses_what_is_no_file() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("weights");
        std::fs::write(&path, b"petek").expect("written");
        let file = MappedFile::open(&path).expect("mapped");
        file.will_read();
        assert_eq!(file.bytes(), b"petek");
        assert_eq!(file.clone().path(), path);

        std::fs::write(dir.path().join("empty"), b"").expect("written");
        for (name, kind) in [
            ("empty", io::ErrorKind::InvalidData),
            (".", io::ErrorKind::InvalidData),
            ("absent", io::ErrorKind::NotFound),
        ] {
            let error = MappedFile::open(dir.path().join(name)).expect_err(name);
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(dir.path().to_str().expect("utf-8")), "{error}");
        }
    }
}
