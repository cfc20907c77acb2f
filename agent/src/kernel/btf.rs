//! Reads field offsets out of BTF, the kernel's description of its own types.
//!
//! A pure function over bytes: the running kernel's `/sys/kernel/btf/vmlinux` or a file cut from another's.
//! Format: Documentation/bpf/btf.rst.
#![forbid(unsafe_code)]

use std::fmt;

const MAGIC: u16 = 0xeb9f;
/// Anonymous structs nest a few levels deep in the kernel; a file that nests deeper is not a kernel's.
const MAX_NESTING: u32 = 16;
/// Members that the search for one name looks at. The largest struct of a kernel has a few hundred; torn BTF may hold
/// structs that contain themselves over and over.
const MAX_MEMBERS: u32 = 100_000;
/// Typedefs and qualifiers in a row.
const MAX_MODIFIERS: u32 = 32;

/// Why bytes are not BTF that we can read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BtfError {
    /// The first bytes are not BTF's.
    BadMagic(u16),
    /// It ends inside what is named.
    Truncated(&'static str),
    /// A type kind that this version does not know.
    UnknownKind { kind: u32, type_id: u32 },
}

impl fmt::Display for BtfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadMagic(magic) => {
                write!(f, "not BTF: it begins with {magic:#06x}, not {MAGIC:#06x}")
            }
            Self::Truncated(part) => write!(f, "BTF is cut short inside its {part}"),
            Self::UnknownKind { kind, type_id } => {
                write!(
                    f,
                    "BTF type {type_id} is of kind {kind}, which this version does not know"
                )
            }
        }
    }
}

impl std::error::Error for BtfError {}

/// A struct of one parsed BTF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StructId(u32);

impl StructId {
    /// As the kernel numbers its types.
    pub fn number(self) -> u32 {
        self.0
    }
}

/// Where a field stands in its struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Bytes from the start of the outermost struct.
    pub offset: u32,
    /// Bits beyond that, of a bit field.
    pub bit: u32,
    type_id: u32,
}

/// Parsed BTF: an index over borrowed bytes.
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Byte offset of each type in `types`; type 0 (void) has none and stands as 0.
    starts: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
enum Kind {
    Int = 1,
    Ptr = 2,
    Array = 3,
    Struct = 4,
    Union = 5,
    Enum = 6,
    Fwd = 7,
    Typedef = 8,
    Volatile = 9,
    Const = 10,
    Restrict = 11,
    Func = 12,
    FuncProto = 13,
    Var = 14,
    Datasec = 15,
    Float = 16,
    DeclTag = 17,
    TypeTag = 18,
    Enum64 = 19,
}

impl Kind {
    const ALL: [Self; 19] = [
        Self::Int,
        Self::Ptr,
        Self::Array,
        Self::Struct,
        Self::Union,
        Self::Enum,
        Self::Fwd,
        Self::Typedef,
        Self::Volatile,
        Self::Const,
        Self::Restrict,
        Self::Func,
        Self::FuncProto,
        Self::Var,
        Self::Datasec,
        Self::Float,
        Self::DeclTag,
        Self::TypeTag,
        Self::Enum64,
    ];

    fn from_number(kind: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|known| *known as u32 == kind)
    }

    /// Bytes that follow the common 12 of a type with `vlen` members.
    fn trailing_bytes(self, vlen: usize) -> usize {
        match self {
            Self::Int | Self::Var | Self::DeclTag => 4,
            Self::Array => 12,
            Self::Struct | Self::Union | Self::Datasec | Self::Enum64 => vlen * 12,
            Self::Enum | Self::FuncProto => vlen * 8,
            Self::Ptr
            | Self::Fwd
            | Self::Typedef
            | Self::Volatile
            | Self::Const
            | Self::Restrict
            | Self::Func
            | Self::Float
            | Self::TypeTag => 0,
        }
    }

    fn is_modifier(self) -> bool {
        matches!(
            self,
            Self::Typedef | Self::Volatile | Self::Const | Self::Restrict | Self::TypeTag
        )
    }
}

/// The common head of a type.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: Kind,
    kind_flag: bool,
    vlen: usize,
    /// Size in bytes, or the id of the type referred to, as the kind has it.
    size_or_type: u32,
    /// Where the trailing bytes begin in the type section.
    body: usize,
}

struct Member {
    name: u32,
    type_id: u32,
    offset_bits: u32,
}

impl<'a> Btf<'a> {
    /// Indexes `bytes`. Costs some milliseconds for a whole kernel.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        let magic = bytes
            .get(..2)
            .map(|head| u16::from_le_bytes([head[0], head[1]]))
            .ok_or(BtfError::Truncated("header"))?;
        if magic != MAGIC {
            return Err(BtfError::BadMagic(magic));
        }
        let header = |at| read_u32(bytes, at).ok_or(BtfError::Truncated("header"));
        let header_len = header(4)? as usize;
        let section = |offset: u32, len: u32, name| {
            let start = header_len.checked_add(offset as usize);
            let end = start.and_then(|start| start.checked_add(len as usize));
            start
                .zip(end)
                .and_then(|(start, end)| bytes.get(start..end))
                .ok_or(BtfError::Truncated(name))
        };
        let types = section(header(8)?, header(12)?, "types")?;
        let strings = section(header(16)?, header(20)?, "strings")?;
        let mut btf = Self {
            types,
            strings,
            starts: vec![0],
        };
        let mut at = 0;
        while at < types.len() {
            let type_id = btf.starts.len() as u32;
            let head = btf.head_at(at, type_id)?;
            btf.starts.push(at as u32);
            at = head.body + head.kind.trailing_bytes(head.vlen);
            if at > types.len() {
                return Err(BtfError::Truncated("types"));
            }
        }
        Ok(btf)
    }

    /// Number of types, void included.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// No type but void.
    pub fn is_empty(&self) -> bool {
        self.len() <= 1
    }

    /// The structs of these names, in one pass; `None` where this kernel has no such struct.
    pub fn structs(&self, names: &[&str]) -> Vec<Option<StructId>> {
        let mut found = vec![None; names.len()];
        for id in 1..self.starts.len() as u32 {
            let Some(head) = self.get(id).filter(|head| head.kind == Kind::Struct) else {
                continue;
            };
            let name = self.string(head.name);
            if let Some(index) = names.iter().position(|wanted| wanted.as_bytes() == name) {
                found[index].get_or_insert(StructId(id));
            }
        }
        found
    }

    /// The field at `path` (`"sk_backlog.rmem_alloc.counter"`), through anonymous structs and unions, or `None`
    /// where this kernel has no such field.
    pub fn field(&self, container: StructId, path: &str) -> Option<Field> {
        let mut field = Field {
            offset: 0,
            bit: 0,
            type_id: container.0,
        };
        for component in path.split('.') {
            let container = self.strip_modifiers(field.type_id)?;
            let mut left = MAX_MEMBERS;
            let (bits, type_id) = self.member(container, component, 0, &mut left)?;
            field = Field {
                offset: field.offset.checked_add(bits / 8)?,
                bit: bits % 8,
                type_id,
            };
        }
        Some(field)
    }

    /// Size in bytes.
    pub fn size(&self, container: StructId) -> Option<u32> {
        Some(self.get(container.0)?.size_or_type)
    }

    /// The number of the function of this name.
    pub fn function(&self, name: &str) -> Option<u32> {
        (1..self.starts.len() as u32).find(|id| {
            self.get(*id).is_some_and(|head| {
                head.kind == Kind::Func && self.string(head.name) == name.as_bytes()
            })
        })
    }

    /// Whether an enum of this name has this enumerator.
    pub fn has_enumerator(&self, name: &str, enumerator: &str) -> bool {
        let enums = (1..self.starts.len() as u32).filter_map(|id| self.get(id));
        let mut enums = enums
            .filter(|head| head.kind == Kind::Enum && self.string(head.name) == name.as_bytes());
        enums.any(|head| {
            let mut names =
                (0..head.vlen).map_while(|index| read_u32(self.types, head.body + index * 8));
            names.any(|name| self.string(name) == enumerator.as_bytes())
        })
    }

    /// Bit offset and type of the member `name` of a struct or union, looked for inside anonymous members too.
    fn member(
        &self,
        container: u32,
        name: &str,
        nesting: u32,
        left: &mut u32,
    ) -> Option<(u32, u32)> {
        if nesting > MAX_NESTING {
            return None;
        }
        let head = self.get(container)?;
        if !matches!(head.kind, Kind::Struct | Kind::Union) {
            return None;
        }
        for index in 0..head.vlen {
            *left = left.checked_sub(1)?;
            let member = self.member_at(&head, index)?;
            if self.string(member.name) == name.as_bytes() {
                return Some((member.offset_bits, member.type_id));
            }
            if self.string(member.name).is_empty()
                && let Some(inner) = self.strip_modifiers(member.type_id)
                && let Some((bits, type_id)) = self.member(inner, name, nesting + 1, left)
            {
                return Some((member.offset_bits.checked_add(bits)?, type_id));
            }
        }
        None
    }

    fn member_at(&self, head: &Type, index: usize) -> Option<Member> {
        let at = head.body + index * 12;
        let offset = read_u32(self.types, at + 8)?;
        Some(Member {
            name: read_u32(self.types, at)?,
            type_id: read_u32(self.types, at + 4)?,
            // With the kind flag, the upper 8 bits hold the width of a bit field.
            offset_bits: if head.kind_flag {
                offset & 0x00ff_ffff
            } else {
                offset
            },
        })
    }

    fn strip_modifiers(&self, mut id: u32) -> Option<u32> {
        for _ in 0..MAX_MODIFIERS {
            let head = self.get(id)?;
            if !head.kind.is_modifier() {
                return Some(id);
            }
            id = head.size_or_type;
        }
        None
    }

    fn get(&self, id: u32) -> Option<Type> {
        if id == 0 {
            return None;
        }
        let at = *self.starts.get(id as usize)? as usize;
        self.head_at(at, id).ok()
    }

    fn head_at(&self, at: usize, type_id: u32) -> Result<Type, BtfError> {
        let word =
            |index: usize| read_u32(self.types, at + index * 4).ok_or(BtfError::Truncated("types"));
        let info = word(1)?;
        let kind = (info >> 24) & 0x1f;
        Ok(Type {
            name: word(0)?,
            kind: Kind::from_number(kind).ok_or(BtfError::UnknownKind { kind, type_id })?,
            kind_flag: info >> 31 == 1,
            vlen: (info & 0xffff) as usize,
            size_or_type: word(2)?,
            body: at + 12,
        })
    }

    fn string(&self, offset: u32) -> &'a [u8] {
        let tail = self.strings.get(offset as usize..).unwrap_or_default();
        let end = tail
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(tail.len());
        &tail[..end]
    }
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(word.try_into().ok()?))
}
