//! Which byte holds which field? Sizes and offsets of every mirrored struct, for the test that compares them with a
//! C compiler's view of the header and with the snapshot `layout.txt`.

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

/// Every mirrored struct, in the order of the header, with the number of fields it had in [`ABI_MINOR_FIRST`].
///
/// [`ABI_MINOR_FIRST`]: crate::ABI_MINOR_FIRST
const STRUCTS: [(StructLayout, usize); 23] = [
    (crate::SpdError::LAYOUT, 7),
    (crate::SpdHost::LAYOUT, 13),
    (crate::SpdDeviceInfo::LAYOUT, 21),
    (crate::SpdOpenOptions::LAYOUT, 7),
    (crate::SpdMemInfo::LAYOUT, 10),
    (crate::SpdHealth::LAYOUT, 8),
    (crate::SpdWeightDesc::LAYOUT, 7),
    (crate::SpdSource::LAYOUT, 5),
    (crate::SpdRow::LAYOUT, 2),
    (crate::SpdKvSlow::LAYOUT, 8),
    (crate::SpdKvDesc::LAYOUT, 10),
    (crate::SpdKvInfo::LAYOUT, 5),
    (crate::SpdKvOp::LAYOUT, 7),
    (crate::SpdProgram::LAYOUT, 14),
    (crate::SpdTensor::LAYOUT, 8),
    (crate::SpdOp::LAYOUT, 11),
    (crate::SpdBucket::LAYOUT, 4),
    (crate::SpdCompile::LAYOUT, 12),
    (crate::SpdPlanInfo::LAYOUT, 10),
    (crate::SpdStep::LAYOUT, 17),
    (crate::SpdProfile::LAYOUT, 4),
    (crate::SpdRun::LAYOUT, 11),
    (crate::SpdApi::LAYOUT, 37),
];

/// `SPD_LAYOUT` of the header: where the first minor's fields lie, in one number. Appending leaves it as it is.
pub const LAYOUT_DIGEST: u64 = digest();

const fn digest() -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut s = 0;
    while s < STRUCTS.len() {
        let (layout, n_fields) = &STRUCTS[s];
        let mut first = 0;
        while first < *n_fields {
            let (mut word, mut k) = (0, 0);
            while k < 4 {
                // The header names the last field again where a struct's fields are no multiple of four.
                let field = if first + k < *n_fields { first + k } else { *n_fields - 1 };
                word |= (layout.fields[field].offset as u64) << (12 * k);
                k += 1;
            }
            hash = (hash ^ word).wrapping_mul(0x0100_0000_01b3);
            first += 4;
        }
        s += 1;
    }
    hash
}

/// The layouts of all mirrored structs, in the order of the header.
pub fn layouts() -> impl Iterator<Item = StructLayout> {
    STRUCTS.into_iter().map(|(layout, _)| layout)
}
