//! Views of plain types as bytes. Invariant: `Plain` is implemented only by `plain!`, which proves at compile time
//! that the fields fill the type without a gap, so every byte of a value is initialised.
#![expect(
    unsafe_code,
    reason = "turns padding-free repr(C) values into bytes and back, the one place that does"
)]

mod sealed {
    pub trait Sealed {}
}

/// A type that may cross the border to the kernel as its bytes: `repr(C)`, no padding, any bit pattern is valid.
pub trait Plain: Copy + Sized + 'static + sealed::Sealed {
    /// Size of the type in bytes, which is also the size of the map's key or value.
    const SIZE: usize = size_of::<Self>();

    /// The value's bytes in native order.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: implementors have no padding (checked by `plain!`), so all SIZE bytes behind `self` are initialised,
        // and the borrow of `self` keeps them alive and unchanged.
        unsafe { core::slice::from_raw_parts(core::ptr::from_ref(self).cast::<u8>(), size_of::<Self>()) }
    }

    /// Reads a value from the first `SIZE` bytes; `None` when there are fewer.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.get(..size_of::<Self>())?;
        // SAFETY: `bytes` holds size_of::<Self>() bytes, the read is unaligned, and any bit pattern is a valid value.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }

    /// The value made of zero bytes.
    fn zeroed() -> Self {
        // SAFETY: any bit pattern, hence also zero, is a valid value.
        unsafe { core::mem::zeroed() }
    }
}

impl sealed::Sealed for u32 {}
impl Plain for u32 {}
impl sealed::Sealed for u64 {}
impl Plain for u64 {}

/// Declares a `repr(C)` struct whose fields are plain integers or arrays of them, and proves its size: the sum of
/// the fields must be the size of the struct and equal to the stated number of bytes.
macro_rules! plain {
    ($(#[$meta:meta])* pub struct $name:ident = $size:literal { $($(#[$fmeta:meta])* pub $field:ident: $ty:ty,)+ }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)+ }
        const _: () = {
            assert!(size_of::<$name>() == $size);
            assert!(0 $(+ size_of::<$ty>())+ == $size);
        };
        impl $crate::layout::Sealed for $name {}
        impl $crate::layout::Plain for $name {}
    };
}
pub(crate) use plain;
pub(crate) use sealed::Sealed;
