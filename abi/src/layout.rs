//! Which byte holds which field? Sizes and offsets of every mirrored struct, for the test that compares them with a
//! C compiler's view of the header and with the snapshot `layout.txt`.

use alloc::vec::Vec;

/// One field of a mirrored struct: name in the header, offset and size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldLayout {
    pub name: &'static str,
    pub offset: usize,
    pub size: usize,
}

/// One mirrored struct: its name in the header, its size in bytes, its fields in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StructLayout {
    pub name: &'static str,
    pub size: usize,
    pub fields: &'static [FieldLayout],
}

/// Implemented by every mirrored struct, through `abi_struct!`.
pub trait Layout {
    const LAYOUT: StructLayout;
}

/// Declares a `repr(C)` mirror of the header's struct `$c` and records its layout. Every field must be valid as
/// all-zero bytes: `Default` is that, and what a caller that knows fewer fields has left out reads as that.
macro_rules! abi_struct {
    ($(#[$meta:meta])* $rust:ident = $c:literal { $($(#[$field_meta:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $rust { $($(#[$field_meta])* pub $field: $kind,)* }

        impl $crate::Layout for $rust {
            const LAYOUT: $crate::StructLayout = $crate::StructLayout {
                name: $c,
                size: size_of::<$rust>(),
                fields: &[$($crate::FieldLayout {
                    name: stringify!($field),
                    offset: core::mem::offset_of!($rust, $field),
                    size: {
                        const fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize { size_of::<F>() }
                        size_of_field(|s: &$rust| &s.$field)
                    },
                },)*],
            };
        }

        impl Default for $rust {
            fn default() -> Self {
                // SAFETY: every field is an integer, a float, a raw pointer, an optional function pointer, or an
                // array or mirror of these; for all of them all-zero bytes are a value.
                unsafe { core::mem::zeroed() }
            }
        }
    };
}
pub(crate) use abi_struct;

/// The layouts of all mirrored structs, in the order of the header.
pub fn layouts() -> Vec<StructLayout> {
    use crate::{
        SpdApi, SpdBucket, SpdCompile, SpdDeviceInfo, SpdError, SpdHealth, SpdHost, SpdKvDesc, SpdKvInfo, SpdKvOp,
        SpdMemInfo, SpdOp, SpdOpenOptions, SpdPlanInfo, SpdProfile, SpdProgram, SpdRow, SpdRun, SpdSource, SpdStep,
        SpdTensor, SpdWeightDesc,
    };
    alloc::vec![
        SpdError::LAYOUT,
        SpdHost::LAYOUT,
        SpdDeviceInfo::LAYOUT,
        SpdOpenOptions::LAYOUT,
        SpdMemInfo::LAYOUT,
        SpdHealth::LAYOUT,
        SpdWeightDesc::LAYOUT,
        SpdSource::LAYOUT,
        SpdRow::LAYOUT,
        SpdKvDesc::LAYOUT,
        SpdKvInfo::LAYOUT,
        SpdKvOp::LAYOUT,
        SpdProgram::LAYOUT,
        SpdTensor::LAYOUT,
        SpdOp::LAYOUT,
        SpdBucket::LAYOUT,
        SpdCompile::LAYOUT,
        SpdPlanInfo::LAYOUT,
        SpdStep::LAYOUT,
        SpdProfile::LAYOUT,
        SpdRun::LAYOUT,
        SpdApi::LAYOUT,
    ]
}
