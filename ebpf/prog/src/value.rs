//! Map values in and out. Invariant: every word is read or written exactly once, so that the core judges the bytes that it
//! uses even when the element is recycled meanwhile.

use core::mem::MaybeUninit;
use core::ptr::{read_volatile, write_volatile};
use sheave_ebpf_abi::Plain;

/// Copies a map value, reading every word of it exactly once.
///
/// Word by word, since LLVM 22 crashes on a volatile copy of a whole struct for this target.
#[inline(always)]
pub fn copy<T: Plain>(value: *const T) -> T {
    const { assert!(size_of::<T>() % 4 == 0 && align_of::<T>() >= 4) };
    let mut out = MaybeUninit::<T>::uninit();
    let from = value.cast::<u32>();
    let into = out.as_mut_ptr().cast::<u32>();
    let mut word = 0;
    while word < size_of::<T>() / 4 {
        // SAFETY: `value` came from a map lookup of this program run: the kernel keeps the element's memory readable
        // until the program ends. Both places hold size_of::<T>() bytes aligned to 4.
        unsafe { into.add(word).write(read_volatile(from.add(word))) };
        word += 1;
    }
    // SAFETY: all bytes were written, and every bit pattern of a plain type is valid.
    unsafe { out.assume_init() }
}

/// Writes a map value in place, word by word as [`copy`] does.
#[inline(always)]
pub fn replace<T: Plain>(place: *mut T, value: &T) {
    const { assert!(size_of::<T>() % 4 == 0 && align_of::<T>() >= 4) };
    let from = core::ptr::from_ref(value).cast::<u32>();
    let into = place.cast::<u32>();
    let mut word = 0;
    while word < size_of::<T>() / 4 {
        // SAFETY: `place` came from a lookup of this program run and stays writable until the program ends; both
        // places hold size_of::<T>() bytes aligned to 4.
        unsafe { write_volatile(into.add(word), from.add(word).read()) };
        word += 1;
    }
}

/// Writes `new` where there is 0, at once; false where there was something else.
///
/// # Safety
/// As for [`exchange64`].
#[inline(always)]
pub unsafe fn claim(place: *mut u64, new: u64) -> bool {
    // SAFETY: as the caller promises.
    unsafe { exchange64(place, 0, new) == 0 }
}

/// Writes `new` where there is `old`, at once, and gives what was there.
///
/// # Safety
/// `place` points into a map value that the kernel keeps writable until the program ends, and is aligned to 8.
#[inline(always)]
pub unsafe fn exchange64(place: *mut u64, old: u64, new: u64) -> u64 {
    // SAFETY: as the caller promises. The instruction is in the kernel since 5.12, and `core` has none for this target.
    unsafe {
        let was: u64;
        core::arch::asm!(
            "r0 = cmpxchg_64({place} + 0, r0, {new})",
            place = in(reg) place,
            new = in(reg) new,
            inout("r0") old => was,
        );
        was
    }
}

/// The same for a word of 32 bits.
///
/// # Safety
/// As for [`exchange64`], with a place that is aligned to 4.
#[inline(always)]
pub unsafe fn exchange32(place: *mut u32, old: u32, new: u32) -> u32 {
    // SAFETY: as the caller promises; as there.
    unsafe {
        let was: u32;
        core::arch::asm!(
            "w0 = cmpxchg32_32({place} + 0, w0, {new})",
            place = in(reg) place,
            new = in(wreg) new,
            inout("w0") old => was,
        );
        was
    }
}

/// Copies a value, reading and writing every word of it exactly once.
///
/// # Safety
/// Both places hold size_of::<T>() bytes aligned to 4, and `from` holds a value.
#[inline(always)]
pub unsafe fn move_words<T: Plain>(from: *const T, into: *mut T) {
    const { assert!(size_of::<T>() % 4 == 0 && align_of::<T>() >= 4) };
    let mut word = 0;
    while word < size_of::<T>() / 4 {
        // SAFETY: as the caller promises.
        unsafe { write_volatile(into.cast::<u32>().add(word), read_volatile(from.cast::<u32>().add(word))) };
        word += 1;
    }
}

/// A number of which the compiler knows nothing more, so that the register which is compared is the one that is used.
#[inline(always)]
pub fn opaque(mut number: u64) -> u64 {
    // SAFETY: the register is moved to itself. Without an instruction the kernel finds two source lines at the next one.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) number, options(pure, nomem)) };
    number
}
