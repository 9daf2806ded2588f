//! The blocks themselves: each stands once, with its parent, in chunks of memory that go back when they are empty.
//!
//! Blocks that are stored one after another mostly lie one after another, so a chain is followed without looking each
//! name up: see [`Blocks::child`].

use hashbrown::HashTable;
use petek_core::hash::BlockName;

use super::holders::SetId;

const CHUNK: usize = 1_024;
/// No node: the parent of a first block, the end of a free list.
const NIL: u32 = u32::MAX;

/// Where a block stands. Valid until the block is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct NodeId(pub(super) u32);

/// A block and what is known of it.
pub(super) struct Node {
    pub(super) name: BlockName,
    /// The block before it. Of a free node: the next free one of its chunk.
    parent: u32,
    pub(super) holders: SetId,
    /// Blocks whose parent this is, then what [`Node::hits`] and [`Node::flag`] say.
    packed: u32,
}

const HITS_SHIFT: u32 = 28;
/// The most hits that are counted.
pub(super) const HITS_MAX: u32 = 3;
const PREDICTED: u32 = 1 << 30;
const LIVE: u32 = 1 << 31;
const CHILDREN_MASK: u32 = (1 << HITS_SHIFT) - 1;

/// What one block takes: its node, and its share of a table that is between 7/16 and 7/8 full.
pub(super) const BLOCK_BYTES: usize = size_of::<Node>() + (size_of::<u32>() + 1) * 16 / 7;

impl Node {
    const FREE: Node = Node { name: BlockName::ROOT, parent: NIL, holders: SetId::EMPTY, packed: 0 };

    pub(super) fn parent(&self) -> Option<NodeId> {
        (self.parent != NIL).then_some(NodeId(self.parent))
    }

    pub(super) fn children(&self) -> u32 {
        self.packed & CHILDREN_MASK
    }

    /// How often it was the end of a match, up to [`HITS_MAX`]; old hits fade.
    pub(super) fn hits(&self) -> u32 {
        self.packed >> HITS_SHIFT & HITS_MAX
    }

    pub(super) fn set_hits(&mut self, hits: u32) {
        self.packed = self.packed & !(HITS_MAX << HITS_SHIFT) | hits.min(HITS_MAX) << HITS_SHIFT;
    }

    /// Whether somebody is predicted to hold it.
    pub(super) fn predicted(&self) -> bool {
        self.packed & PREDICTED != 0
    }

    pub(super) fn set_predicted(&mut self, predicted: bool) {
        self.packed = self.packed & !PREDICTED | if predicted { PREDICTED } else { 0 };
    }

    /// Whether anything is known of it: if not, it only stands here for its children.
    pub(super) fn is_bare(&self) -> bool {
        self.holders == SetId::EMPTY && !self.predicted()
    }

    fn is_live(&self) -> bool {
        self.packed & LIVE != 0
    }
}

/// See the head of this file.
pub(super) struct Blocks {
    chunks: Vec<Chunk>,
    /// Chunks with live and free nodes.
    partial: Vec<u32>,
    /// Chunks without memory.
    vacant: Vec<u32>,
    by_name: HashTable<u32>,
    live: usize,
}

struct Chunk {
    nodes: Option<Box<[Node]>>,
    first_free: u32,
    live: u32,
    /// Its place in `partial`.
    at: u32,
}

impl Blocks {
    pub(super) fn new() -> Self {
        Blocks { chunks: vec![], partial: vec![], vacant: vec![], by_name: HashTable::new(), live: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.live
    }

    /// Ids are below it.
    pub(super) fn id_end(&self) -> u32 {
        (self.chunks.len() * CHUNK) as u32
    }

    pub(super) fn bytes(&self) -> usize {
        let chunks = self.chunks.len() - self.vacant.len();
        chunks * CHUNK * size_of::<Node>()
            + self.chunks.capacity() * size_of::<Chunk>()
            + self.by_name.allocation_size()
    }

    pub(super) fn find(&self, name: BlockName) -> Option<NodeId> {
        let equal = |&id: &u32| self[NodeId(id)].name == name;
        self.by_name.find(hash(name), equal).map(|&id| NodeId(id))
    }

    /// The block of this name after `parent`: where the block stored after it stands, if that is it.
    pub(super) fn child(&self, parent: Option<NodeId>, name: BlockName) -> Option<NodeId> {
        if let Some(NodeId(before)) = parent
            && let Some(next) = self.live(before + 1)
            && next.name == name
            && next.parent == before
        {
            return Some(NodeId(before + 1));
        }
        self.find(name)
    }

    /// The node of an id, if it is live; ids may be any numbers.
    pub(super) fn live(&self, id: u32) -> Option<&Node> {
        let chunk = self.chunks.get(id as usize / CHUNK)?;
        chunk.nodes.as_ref().map(|nodes| &nodes[id as usize % CHUNK]).filter(|node| node.is_live())
    }

    /// Puts a block in that is not there.
    pub(super) fn insert(&mut self, name: BlockName, parent: Option<NodeId>) -> NodeId {
        let number = match self.partial.last() {
            Some(&number) => number,
            None => self.open_chunk(),
        };
        let chunk = &mut self.chunks[number as usize];
        let nodes = chunk.nodes.as_mut().expect("an open chunk has memory");
        let at = chunk.first_free;
        let node = &mut nodes[at as usize];
        chunk.first_free = node.parent;
        let parent_id = parent.map_or(NIL, |parent| parent.0);
        *node = Node { name, parent: parent_id, holders: SetId::EMPTY, packed: LIVE };
        chunk.live += 1;
        if chunk.first_free == NIL {
            self.partial.pop();
        }
        let id = number * CHUNK as u32 + at;
        let chunks = &self.chunks;
        self.by_name.insert_unique(hash(name), id, |&id| hash(node_of(chunks, id).name));
        self.live += 1;
        if let Some(parent) = parent {
            self[parent].packed += 1;
        }
        NodeId(id)
    }

    /// Takes a block out that has no children, and says what its parent was.
    pub(super) fn remove(&mut self, id: NodeId) -> Option<NodeId> {
        let node = &self[id];
        debug_assert!(node.is_live() && node.children() == 0);
        let (name, parent) = (node.name, node.parent());
        if let Ok(found) = self.by_name.find_entry(hash(name), |&other| other == id.0) {
            found.remove();
        }
        self.live -= 1;
        if let Some(parent) = parent {
            self[parent].packed -= 1;
        }
        let (number, at) = (id.0 / CHUNK as u32, id.0 % CHUNK as u32);
        let chunk = &mut self.chunks[number as usize];
        let nodes = chunk.nodes.as_mut().expect("a live node's chunk has memory");
        nodes[at as usize] = Node { parent: chunk.first_free, ..Node::FREE };
        if chunk.first_free == NIL {
            chunk.at = self.partial.len() as u32;
            self.partial.push(number);
        }
        let chunk = &mut self.chunks[number as usize];
        chunk.first_free = at;
        chunk.live -= 1;
        if chunk.live == 0 {
            chunk.nodes = None;
            let place = chunk.at as usize;
            self.vacant.push(number);
            self.partial.swap_remove(place);
            if let Some(&moved) = self.partial.get(place) {
                self.chunks[moved as usize].at = place as u32;
            }
        }
        if self.live < self.by_name.capacity() / 4 {
            let chunks = &self.chunks;
            self.by_name.shrink_to(2 * self.live, |&id| hash(node_of(chunks, id).name));
        }
        parent
    }

    fn open_chunk(&mut self) -> u32 {
        let number = self.vacant.pop().unwrap_or_else(|| {
            self.chunks.push(Chunk { nodes: None, first_free: NIL, live: 0, at: 0 });
            self.chunks.len() as u32 - 1
        });
        let next = |at: usize| if at + 1 < CHUNK { at as u32 + 1 } else { NIL };
        let chunk = &mut self.chunks[number as usize];
        chunk.nodes = Some((0..CHUNK).map(|at| Node { parent: next(at), ..Node::FREE }).collect());
        chunk.first_free = 0;
        chunk.at = self.partial.len() as u32;
        self.partial.push(number);
        number
    }
}

impl std::ops::Index<NodeId> for Blocks {
    type Output = Node;

    fn index(&self, id: NodeId) -> &Node {
        node_of(&self.chunks, id.0)
    }
}

impl std::ops::IndexMut<NodeId> for Blocks {
    fn index_mut(&mut self, id: NodeId) -> &mut Node {
        let chunk = &mut self.chunks[id.0 as usize / CHUNK];
        &mut chunk.nodes.as_mut().expect("a live node's chunk has memory")[id.0 as usize % CHUNK]
    }
}

fn node_of(chunks: &[Chunk], id: u32) -> &Node {
    let nodes = chunks[id as usize / CHUNK].nodes.as_ref();
    &nodes.expect("a live node's chunk has memory")[id as usize % CHUNK]
}

/// A name is a part of a cryptographic hash: its first bytes are as good as any hash of it.
fn hash(name: BlockName) -> u64 {
    u64::from_le_bytes(*name.0.first_chunk().expect("16 bytes hold 8"))
}
