//! Reads field offsets from BTF, the kernel's description of its own types.
//!
//! A pure function of bytes: those of the running kernel's `/sys/kernel/btf/vmlinux`, or of an excerpt from another kernel's.
//! Format: Documentation/bpf/btf.rst.
#![forbid(unsafe_code)]

use std::fmt;

/// `BTF_MAGIC`, include/uapi/linux/btf.h.
const MAGIC: u16 = 0xeb9f;
/// Maximum number of levels of nested anonymous structs that the search descends. The kernel nests them a few levels
/// deep.
const MAX_NESTING: u32 = 16;
/// Maximum number of members that the search for one name visits. The largest kernel struct has a few hundred; corrupt
/// BTF may have structs that contain themselves.
const MAX_MEMBERS: u32 = 100_000;
/// Maximum length of a chain of typedefs and qualifiers that is followed; corrupt BTF may have cycles.
const MAX_MODIFIERS: u32 = 32;

/// Why bytes cannot be parsed as BTF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BtfError {
    /// The magic number is wrong.
    BadMagic(u16),
    /// The bytes end inside the named section.
    Truncated(&'static str),
    /// A kind of type that this version does not know.
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

/// A struct in a parsed BTF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StructId(u32);

impl StructId {
    /// The BTF type id.
    pub fn number(self) -> u32 {
        self.0
    }
}

/// The location of a field in its struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Bytes from the start of the outermost struct.
    pub offset: u32,
    /// Additional bits, for a bit field.
    pub bit: u32,
    type_id: u32,
}

/// Parsed BTF: an index over borrowed bytes.
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Byte offset of each type in `types`, by type id; type 0 (void) has no entry there and is a placeholder.
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

    /// Bytes that follow the common 12-byte header of a type with `vlen` members.
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

/// The common header of a type.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: Kind,
    kind_flag: bool,
    vlen: usize,
    /// Size in bytes or id of the referenced type, depending on the kind.
    size_or_type: u32,
    /// Offset of the trailing bytes in the type section.
    body: usize,
}

struct Member {
    name: u32,
    type_id: u32,
    offset_bits: u32,
}

impl<'a> Btf<'a> {
    /// Indexes `bytes`, which takes about 3 ms for the 5 MB of a whole kernel.
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
            let head = btf.type_at(at, type_id)?;
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

    /// Whether there is no type but void.
    pub fn is_empty(&self) -> bool {
        self.len() <= 1
    }

    /// Finds the structs of these names in one pass; `None` for a name that does not exist.
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

    /// Finds the field at `path` (`"sk_backlog.rmem_alloc.counter"`, `"regs[1]"`), descending into anonymous structs and unions.
    /// `None` if it does not exist.
    pub fn field(&self, container: StructId, path: &str) -> Option<Field> {
        let mut field = Field {
            offset: 0,
            bit: 0,
            type_id: container.0,
        };
        for component in path.split('.') {
            let (name, index) = match component.split_once('[') {
                Some((name, index)) => (name, Some(index.strip_suffix(']')?.parse().ok()?)),
                None => (component, None),
            };
            let container = self.strip_modifiers(field.type_id)?;
            let mut left = MAX_MEMBERS;
            let (bits, type_id) = self.member(container, name, 0, &mut left)?;
            field = Field {
                offset: field.offset.checked_add(bits / 8)?,
                bit: bits % 8,
                type_id,
            };
            if let Some(index) = index {
                field = self.element(field, index)?;
            }
        }
        Some(field)
    }

    /// The element of an array of integers or structs.
    fn element(&self, array: Field, index: u32) -> Option<Field> {
        let head = self.get(self.strip_modifiers(array.type_id)?)?;
        if head.kind != Kind::Array {
            return None;
        }
        let type_id = read_u32(self.types, head.body)?;
        let count = read_u32(self.types, head.body + 8)?;
        let element = self.get(self.strip_modifiers(type_id)?)?;
        if index >= count || !matches!(element.kind, Kind::Int | Kind::Struct) {
            return None;
        }
        let offset = index.checked_mul(element.size_or_type)?;
        Some(Field {
            offset: array.offset.checked_add(offset)?,
            bit: 0,
            type_id,
        })
    }

    /// Size in bytes.
    pub fn size(&self, container: StructId) -> Option<u32> {
        Some(self.get(container.0)?.size_or_type)
    }

    /// The BTF id of the function of this name.
    pub fn function(&self, name: &str) -> Option<u32> {
        (1..self.starts.len() as u32).find(|id| {
            self.get(*id).is_some_and(|head| {
                head.kind == Kind::Func && self.string(head.name) == name.as_bytes()
            })
        })
    }

    /// Whether the enum of this name has this enumerator.
    pub fn has_enumerator(&self, name: &str, enumerator: &str) -> bool {
        self.enumerator(name, enumerator).is_some()
    }

    /// The value of an enumerator of the enum of this name.
    pub fn enumerator(&self, name: &str, enumerator: &str) -> Option<u32> {
        let enums = (1..self.starts.len() as u32).filter_map(|id| self.get(id));
        let mut enums = enums
            .filter(|head| head.kind == Kind::Enum && self.string(head.name) == name.as_bytes());
        enums.find_map(|head| {
            let mut places = (0..head.vlen).map(|index| head.body + index * 8);
            let place = places.find(|at| {
                read_u32(self.types, *at)
                    .is_some_and(|name| self.string(name) == enumerator.as_bytes())
            })?;
            read_u32(self.types, place + 4)
        })
    }

    /// Whether the field at `path` exists and is a pointer.
    pub fn is_pointer(&self, container: StructId, path: &str) -> bool {
        let field = self.field(container, path);
        let id = field.and_then(|field| self.strip_modifiers(field.type_id));
        id.and_then(|id| self.get(id))
            .is_some_and(|head| head.kind == Kind::Ptr)
    }

    /// Bit offset and type of the member `name` of a struct or union, including those of anonymous members.
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
        self.type_at(at, id).ok()
    }

    fn type_at(&self, at: usize, type_id: u32) -> Result<Type, BtfError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct pt_regs { u64 sp; u64 regs[31]; }`
    fn registers() -> Vec<u8> {
        const STRINGS: &[u8] = b"\0u64\0pt_regs\0regs\0sp\0";
        let kind = |kind: Kind, members: u32| (kind as u32) << 24 | members;
        // Each: name, kind, size; then what follows for its kind.
        let types: [&[u32]; 3] = [
            &[1, kind(Kind::Int, 0), 8, 64],
            &[0, kind(Kind::Array, 0), 0, 1, 1, 31],
            &[5, kind(Kind::Struct, 2), 256, 18, 1, 0, 13, 2, 64],
        ];
        let types = types.concat();
        let types_len = types.len() as u32 * 4;
        let header = [24, 0, types_len, types_len, STRINGS.len() as u32];
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend([1, 0]);
        bytes.extend(header.into_iter().chain(types).flat_map(u32::to_le_bytes));
        bytes.extend(STRINGS);
        bytes
    }

    #[test]
    fn elements_of_arrays_are_found_within_their_bounds() {
        let bytes = registers();
        let btf = Btf::parse(&bytes).unwrap();
        let [Some(registers)] = btf.structs(&["pt_regs"])[..] else {
            panic!("no struct pt_regs");
        };
        let offset = |path| btf.field(registers, path).map(|field| field.offset);
        assert_eq!(offset("sp"), Some(0));
        assert_eq!(offset("regs"), Some(8));
        assert_eq!(offset("regs[0]"), Some(8));
        assert_eq!(offset("regs[30]"), Some(248));
        for wrong in ["regs[31]", "regs[-1]", "regs[2", "regs[]", "sp[0]"] {
            assert_eq!(offset(wrong), None, "{wrong}");
        }
    }
}
