//! Large memory for weights and the KV cache: anonymous, zeroed, in huge pages where the system grants them. From 4 KiB
//! pages a stream of weights comes at little more than half the rate.

use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;

use crate::DeviceError;

const HUGE_PAGE: usize = 2 << 20;

mod sealed {
    pub trait Sealed {}
}

/// A plain number: any bits are a value, zero bits are zero, no padding.
pub trait Number: Copy + Send + Sync + sealed::Sealed + 'static {}

macro_rules! numbers {
    ($($number:ty),*) => { $(impl sealed::Sealed for $number {} impl Number for $number {})* };
}
numbers!(u8, i8, u16, u32, u64, f32);

/// Zeroed memory of `len` numbers, aligned to 2 MiB if it is that large and to a page otherwise, given back on drop.
#[derive(Debug)]
pub struct HugeBuffer<T: Number> {
    data: NonNull<T>,
    len: usize,
    /// What was mapped, from `data` on.
    mapped_bytes: usize,
    owns: PhantomData<T>,
}

// SAFETY: the buffer owns its mapping alone, and numbers may be moved and read from any thread; writing needs `&mut self`
// or the promise that `as_ptr` asks of its caller.
unsafe impl<T: Number> Send for HugeBuffer<T> {}
// SAFETY: as above.
unsafe impl<T: Number> Sync for HugeBuffer<T> {}

impl<T: Number> HugeBuffer<T> {
    /// Maps zeroed memory; pages are touched when first written or read. `what` is for the error.
    ///
    /// *Errors*: [`DeviceError::Memory`] if the system gives none, or the size overflows.
    pub fn zeroed(what: &str, len: usize) -> Result<Self, DeviceError> {
        let failed =
            |bytes: usize, source: io::Error| DeviceError::Memory { what: what.to_owned(), bytes, source };
        let bytes =
            len.checked_mul(size_of::<T>()).filter(|bytes| *bytes <= isize::MAX as usize - 2 * HUGE_PAGE);
        let bytes = bytes.ok_or_else(|| failed(usize::MAX, io::ErrorKind::OutOfMemory.into()))?;
        // Small buffers take small pages: rounding a norm's weights up to 2 MiB would cost more than it brings.
        let huge = bytes >= HUGE_PAGE;
        let mapped_bytes = bytes.max(1).next_multiple_of(if huge { HUGE_PAGE } else { page_bytes() });
        let slack = if huge { HUGE_PAGE } else { 0 };
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at an address of the system's choice touches no memory that anyone has.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), mapped_bytes + slack, protection, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return Err(failed(bytes, io::Error::last_os_error()));
        }
        let before = if huge { raw.align_offset(HUGE_PAGE) } else { 0 };
        // SAFETY: `before` is below 2 MiB = `slack`, so head, buffer and tail all lie inside the mapping just made. Head and
        // tail are given back to the system, and nobody holds an address in them.
        let data = unsafe {
            let data = raw.byte_add(before);
            if before > 0 {
                libc::munmap(raw, before);
            }
            if slack > before {
                libc::munmap(data.byte_add(mapped_bytes), slack - before);
            }
            #[cfg(target_os = "linux")]
            if huge {
                // A wish: where the system refuses, reading is slower and nothing else changes.
                libc::madvise(data, mapped_bytes, libc::MADV_HUGEPAGE);
            }
            data.cast::<T>()
        };
        let data = NonNull::new(data).ok_or_else(|| failed(bytes, io::ErrorKind::OutOfMemory.into()))?;
        Ok(Self { data, len, mapped_bytes, owns: PhantomData })
    }

    /// Numbers in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held, with the last page's rest.
    pub fn bytes_held(&self) -> usize {
        self.mapped_bytes
    }

    /// The numbers.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `data` is the start of a live mapping of at least `len` numbers, aligned to a page, zeroed at the start,
        // and any bits are a `T`. Whoever writes through `as_ptr` promised that no such slice is read meanwhile.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }

    /// The numbers, to write.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as `as_slice`; `&mut self` makes it the only one.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }

    /// The first number's address, for kernels whose threads write disjoint parts at once. Whoever writes through it keeps
    /// inside `len`, off what others access meanwhile, and off what a live slice of this buffer covers.
    pub fn as_ptr(&self) -> *mut T {
        self.data.as_ptr()
    }
}

impl<T: Number> Drop for HugeBuffer<T> {
    fn drop(&mut self) {
        // SAFETY: exactly what `zeroed` kept of its mapping; the borrows of it have ended with `self`.
        unsafe { libc::munmap(self.data.as_ptr().cast(), self.mapped_bytes) };
    }
}

fn page_bytes() -> usize {
    // SAFETY: sysconf reads a constant of the system.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).ok().filter(|bytes| bytes.is_power_of_two()).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_writable_at_every_size() {
        for len in [0, 1, 1023, 1024, 524_287, 524_288, 524_289, 3 << 20] {
            let mut buffer = HugeBuffer::<f32>::zeroed("test", len).expect("memory");
            let alignment = if len * 4 >= HUGE_PAGE { HUGE_PAGE } else { page_bytes() };
            assert!(buffer.as_ptr().addr().is_multiple_of(alignment), "{len}");
            assert!(buffer.as_slice().iter().all(|x| x.to_bits() == 0), "{len}");
            buffer.as_mut_slice().fill(1.5);
            assert_eq!(buffer.as_slice(), vec![1.5; len]);
            assert_eq!((buffer.len(), buffer.is_empty()), (len, len == 0));
            assert!(buffer.bytes_held() >= len * 4);
        }
    }

    #[test]
    fn a_size_beyond_the_machine_is_an_error_with_its_name() {
        for len in [usize::MAX, usize::MAX / 4, 1 << 60] {
            let error = HugeBuffer::<f32>::zeroed("the KV cache", len).expect_err("no machine has this");
            assert!(error.to_string().contains("the KV cache"), "{error}");
        }
    }
}
