//! Reads BTF and writes it again with only the requested fields. Format: Documentation/bpf/btf.rst.
//!
//! A kept struct keeps its size and loses the members that do not lead to a requested field. Structs that are only pointed to
//! become forward declarations. The order of types is unchanged.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};

use super::table::Place;

const MAGIC: u32 = 0xeb9f;
const HEADER_BYTES: usize = 24;

const PTR: u32 = 2;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FWD: u32 = 7;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// One type: the three common words, and the words that follow.
#[derive(Clone)]
struct Type {
    name: u32,
    info: u32,
    size_or_type: u32,
    body: Vec<u32>,
}

impl Type {
    fn kind(&self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn is_modifier(&self) -> bool {
        matches!(
            self.kind(),
            TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG
        )
    }

    fn is_struct_or_union(&self) -> bool {
        matches!(self.kind(), STRUCT | UNION)
    }

    fn members(&self) -> impl Iterator<Item = Member> + use<'_> {
        let members = if self.is_struct_or_union() {
            self.body.as_slice()
        } else {
            &[]
        };
        members.chunks_exact(3).map(|words| Member {
            name: words[0],
            type_id: words[1],
            // With the kind flag, the upper 8 bits hold the width of a bit field.
            bits: if self.info >> 31 == 1 {
                words[2] & 0x00ff_ffff
            } else {
                words[2]
            },
        })
    }
}

struct Member {
    name: u32,
    type_id: u32,
    bits: u32,
}

/// The types of one kernel.
pub struct Types {
    /// By id; 0 is void.
    types: Vec<Type>,
    strings: Vec<u8>,
}

/// Types to keep, with the member indices of structs and unions.
type Kept = BTreeMap<u32, BTreeSet<usize>>;

impl Types {
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let words: Vec<u32> = bytes
            .chunks(4)
            .map(|word| {
                let mut whole = [0; 4];
                whole[..word.len()].copy_from_slice(word);
                u32::from_le_bytes(whole)
            })
            .collect();
        let header = |at: usize| words.get(at).copied().context("the header is incomplete");
        ensure!(header(0)? & 0xffff == MAGIC, "not BTF");
        let start = header(1)? as usize;
        let section = |offset: u32, len: u32| {
            let begin = start + offset as usize;
            begin..begin + len as usize
        };
        let types = section(header(2)?, header(3)?);
        let strings = section(header(4)?, header(5)?);
        let strings = bytes
            .get(strings)
            .context("the string section is missing")?
            .to_vec();
        let mut rest = words
            .get(types.start / 4..types.end / 4)
            .context("the type section is missing")?;
        let mut types = vec![Type {
            name: 0,
            info: 0,
            size_or_type: 0,
            body: Vec::new(),
        }];
        while let [name, info, size_or_type, tail @ ..] = rest {
            let len = body_words(info >> 24 & 0x1f, (info & 0xffff) as usize)?;
            let body = tail.get(..len).context("a type is cut short")?;
            types.push(Type {
                name: *name,
                info: *info,
                size_or_type: *size_or_type,
                body: body.to_vec(),
            });
            rest = &tail[len..];
        }
        Ok(Self { types, strings })
    }

    /// Offset of the field in bytes (or bits) from the start of the struct, or the size of the struct.
    pub fn offset(&self, place: &Place) -> Option<u32> {
        let container = self.structure(&place.container)?;
        if place.paths.is_empty() {
            return Some(self.types[container as usize].size_or_type);
        }
        let steps = place
            .paths
            .iter()
            .find_map(|path| self.steps(container, path))?;
        let bits: u32 = steps.iter().map(|step| step.bits).sum();
        Some(if place.bits { bits } else { bits / 8 })
    }

    fn structure(&self, name: &str) -> Option<u32> {
        let found = self
            .types
            .iter()
            .position(|one| one.kind() == STRUCT && self.string(one.name) == name.as_bytes());
        found.map(|id| id as u32)
    }

    fn string(&self, at: u32) -> &[u8] {
        let tail = self.strings.get(at as usize..).unwrap_or_default();
        tail.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// The members on `path` (for example `se.sum_exec_runtime`), including anonymous ones.
    fn steps(&self, container: u32, path: &str) -> Option<Vec<Step>> {
        let mut steps = Vec::new();
        let mut inside = container;
        for name in path.split('.') {
            let found = self.search(self.behind(inside), name.as_bytes())?;
            inside = found.last()?.type_id;
            steps.extend(found);
        }
        Some(steps)
    }

    fn search(&self, container: u32, name: &[u8]) -> Option<Vec<Step>> {
        let structure = self.types.get(container as usize)?;
        structure.members().enumerate().find_map(|(index, member)| {
            let step = Step {
                container,
                index,
                bits: member.bits,
                type_id: member.type_id,
            };
            match self.string(member.name) {
                b"" => {
                    let inner = self.search(self.behind(member.type_id), name)?;
                    Some(std::iter::once(step).chain(inner).collect())
                }
                found => (found == name).then(|| vec![step]),
            }
        })
    }

    /// The type behind typedefs and qualifiers.
    fn behind(&self, mut id: u32) -> u32 {
        while self.types[id as usize].is_modifier() {
            id = self.types[id as usize].size_or_type;
        }
        id
    }

    /// Returns BTF with only these fields.
    pub fn cut(&self, places: &[Place]) -> Result<Vec<u8>> {
        let mut kept = Kept::new();
        for place in places {
            let Some(container) = self.structure(&place.container) else {
                continue;
            };
            self.keep(container, &mut kept);
            // Keep all alternatives; the agent chooses one.
            for step in place
                .paths
                .iter()
                .filter_map(|path| self.steps(container, path))
                .flatten()
            {
                kept.entry(step.container).or_default().insert(step.index);
                self.keep(step.type_id, &mut kept);
            }
        }
        self.write(&kept)
    }

    /// Keeps a type and the types that it contains by value.
    fn keep(&self, id: u32, kept: &mut Kept) {
        let one = &self.types[id as usize];
        if id == 0 || kept.contains_key(&id) {
            return;
        }
        kept.insert(id, BTreeSet::new());
        match one.kind() {
            ARRAY => one.body[..2].iter().for_each(|id| self.keep(*id, kept)),
            _ if one.is_modifier() => self.keep(one.size_or_type, kept),
            _ => {}
        }
    }

    fn write(&self, kept: &Kept) -> Result<Vec<u8>> {
        let new_ids: BTreeMap<u32, u32> = kept.keys().copied().zip(1..).collect();
        let mut out = Out::default();
        // Structs that are only pointed to become forward declarations at the end.
        let mut declared: BTreeMap<u32, u32> = BTreeMap::new();
        for (id, members) in kept {
            let one = &self.types[*id as usize];
            let new = |id: &u32| new_ids.get(id).copied().unwrap_or(0);
            let mut small = one.clone();
            small.name = out.string(self.string(one.name));
            match one.kind() {
                STRUCT | UNION => {
                    small.info = one.info & !0xffff | members.len() as u32;
                    let words = one.body.chunks_exact(3).enumerate();
                    let words = words.filter(|(index, _)| members.contains(index));
                    small.body = words
                        .flat_map(|(_, words)| {
                            [out.string(self.string(words[0])), new(&words[1]), words[2]]
                        })
                        .collect();
                }
                ARRAY => small.body = vec![new(&one.body[0]), new(&one.body[1]), one.body[2]],
                ENUM | ENUM64 => {
                    small.info = one.info & !0xffff;
                    small.body.clear();
                }
                PTR => {
                    let target = self.behind(one.size_or_type);
                    let is_struct = self.types[target as usize].is_struct_or_union();
                    small.size_or_type = match new_ids.get(&target) {
                        Some(id) => *id,
                        None if is_struct && self.types[target as usize].name != 0 => {
                            let next = (kept.len() + declared.len() + 1) as u32;
                            *declared.entry(target).or_insert(next)
                        }
                        None => 0,
                    };
                }
                _ if one.is_modifier() => small.size_or_type = new(&one.size_or_type),
                _ => {}
            }
            out.types.push(small);
        }
        let mut declared: Vec<_> = declared.into_iter().collect();
        declared.sort_unstable_by_key(|(_, new)| *new);
        for (id, _) in declared {
            let one = &self.types[id as usize];
            // The kind flag of a forward declaration marks a union.
            let info = FWD << 24 | u32::from(one.kind() == UNION) << 31;
            let name = out.string(self.string(one.name));
            out.types.push(Type {
                name,
                info,
                size_or_type: 0,
                body: Vec::new(),
            });
        }
        Ok(out.finish())
    }
}

/// A member on the path to a field.
struct Step {
    container: u32,
    index: usize,
    bits: u32,
    type_id: u32,
}

/// Number of words after the three common ones.
fn body_words(kind: u32, vlen: usize) -> Result<usize> {
    Ok(match kind {
        // Int, var, declaration tag.
        1 | 14 | 17 => 1,
        ARRAY => 3,
        // Section of data.
        STRUCT | UNION | ENUM64 | 15 => vlen * 3,
        // Function prototype.
        ENUM | 13 => vlen * 2,
        // Function, float.
        PTR | FWD | TYPEDEF | VOLATILE | CONST | RESTRICT | 12 | 16 | TYPE_TAG => 0,
        kind => bail!("unknown type kind {kind}"),
    })
}

/// The output.
#[derive(Default)]
struct Out {
    types: Vec<Type>,
    strings: Vec<u8>,
    known: BTreeMap<Vec<u8>, u32>,
}

impl Out {
    /// Offset of a string; the empty string is at 0.
    fn string(&mut self, text: &[u8]) -> u32 {
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        if text.is_empty() {
            return 0;
        }
        let end = self.strings.len() as u32;
        *self.known.entry(text.to_vec()).or_insert_with(|| {
            self.strings.extend(text);
            self.strings.push(0);
            end
        })
    }

    fn finish(self) -> Vec<u8> {
        let types: Vec<u8> = self
            .types
            .iter()
            .flat_map(|one| {
                [one.name, one.info, one.size_or_type]
                    .into_iter()
                    .chain(one.body.clone())
            })
            .flat_map(u32::to_le_bytes)
            .collect();
        // First word: magic, version 1, no flags. Then the sections, back to back.
        let header = [
            MAGIC | 1 << 16,
            HEADER_BYTES as u32,
            0,
            types.len() as u32,
            types.len() as u32,
            self.strings.len() as u32,
        ];
        let header = header.into_iter().flat_map(u32::to_le_bytes);
        header.chain(types).chain(self.strings).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(container: &str, paths: &[&str]) -> Place {
        Place {
            bits: false,
            container: container.to_owned(),
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }
    }

    /// `struct outer { int a; struct { int unused; inner_t *b; }; inner_t c; }`, `typedef struct inner inner_t`,
    /// `struct inner { int d; int e; }`.
    fn sample() -> Vec<u8> {
        let mut out = Out::default();
        let add = |out: &mut Out, name: &str, info: u32, size_or_type: u32, body: &[u32]| {
            let name = out.string(name.as_bytes());
            let body = body.to_vec();
            out.types.push(Type {
                name,
                info,
                size_or_type,
                body,
            });
        };
        let [a, b, c, d, e, unused] =
            ["a", "b", "c", "d", "e", "unused"].map(|name| out.string(name.as_bytes()));
        add(&mut out, "int", 1 << 24, 4, &[32]);
        add(&mut out, "inner", STRUCT << 24 | 2, 8, &[d, 1, 0, e, 1, 32]);
        add(&mut out, "inner_t", TYPEDEF << 24, 2, &[]);
        add(&mut out, "", PTR << 24, 3, &[]);
        add(
            &mut out,
            "",
            STRUCT << 24 | 2,
            16,
            &[unused, 1, 0, b, 4, 64],
        );
        let members = [a, 1, 0, 0, 5, 64, c, 3, 192];
        add(&mut out, "outer", STRUCT << 24 | 3, 32, &members);
        out.finish()
    }

    #[test]
    fn fields_keep_their_offsets() -> Result<()> {
        let whole = Types::parse(&sample())?;
        let places = [
            place("outer", &["b"]),
            place("outer", &["absent", "c.e"]),
            place("outer", &[]),
        ];
        let cut = whole.cut(&places)?;
        let cut = Types::parse(&cut)?;
        for (place, offset) in places.iter().zip([16, 28, 32]) {
            assert_eq!(whole.offset(place), Some(offset), "{place}");
            assert_eq!(cut.offset(place), Some(offset), "{place}");
        }
        for removed in ["a", "unused", "c.d"] {
            assert!(whole.offset(&place("outer", &[removed])).is_some());
            assert_eq!(cut.offset(&place("outer", &[removed])), None);
        }
        Ok(())
    }

    #[test]
    fn structs_that_are_only_pointed_to_become_forward_declarations() -> Result<()> {
        let whole = Types::parse(&sample())?;
        let cut = Types::parse(&whole.cut(&[place("outer", &["b"])])?)?;
        let inner = cut
            .types
            .iter()
            .find(|one| cut.string(one.name) == b"inner");
        assert_eq!(inner.map(Type::kind), Some(FWD));
        assert_eq!(cut.types.len(), 5);
        Ok(())
    }
}
