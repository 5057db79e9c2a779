//! What is prepared once so that a step only computes? Shapes checked, tensors placed.
//!
//! Tensors inside the plan share one arena: each lives from the operator that writes it to the last that reads it.

mod beside;
mod joint;

pub(crate) use joint::owner;

use crate::execute::Scratch;
use crate::memory::{Pool, Weight};
use crate::packing::pack;
use crate::threads::Team;
use crate::validate::Bound;
use beside::{Steps, rounded_weight};
use memmap2::{Advice, MmapMut};
use sparsed_abi::{
    ARENA_ALIGN, DIM_LOGITS, DIM_SEQS, DIM_TOKENS, E_NOMEM_DEVICE, NO_TENSOR, Program, SpdBucket, SpdTensor,
    T_ACTIVATION, T_INPUT, T_OUTPUT, T_VIEW,
};
use sparsed_plugin_kit::{Held, PlanSizes, PluginError, Result, Usage};
use std::sync::{Arc, Mutex};

/// Where a tensor's values are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// From this f32 of the workspace on.
    Workspace(usize),
    /// In the input arena, in order.
    Input,
    /// In the output arena, in order.
    Output,
    /// A bound weight.
    Weight,
    /// Inside another tensor.
    View,
}

/// A compiled program.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) program: Program,
    pub(crate) weights: Vec<Arc<Weight>>,
    pub(crate) pools: Vec<Arc<Pool>>,
    pub(crate) bucket: SpdBucket,
    pub(crate) places: Vec<Place>,
    /// Operators by number, in the order in which they run; those of an entry read the same rows and run together.
    pub(crate) order: Vec<Vec<usize>>,
    /// Held for the whole of a step: a plan runs one step at a time.
    pub(crate) workspace: Mutex<Workspace>,
    _held: Held,
}

/// Memory of a running step.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// The arena of the plan's own tensors, f32 by f32. A mapping begins a cache line, which what malloc gives does
    /// not: every second store of a kernel would fall into two of them.
    pub(crate) arena: MmapMut,
    /// Rounded activations.
    pub(crate) rounded: Scratch,
    /// Indexer scores of a single token.
    pub(crate) scores: Vec<f32>,
}

/// A tensor's row count for these numbers of tokens, sequences and logits rows.
pub(crate) fn rows_of(tensor: &SpdTensor, tokens: usize, seqs: usize, logits: usize) -> usize {
    match tensor.dim[0] {
        DIM_TOKENS => tokens,
        DIM_SEQS => seqs,
        DIM_LOGITS => logits,
        n => n.unsigned_abs() as usize,
    }
}

/// Values in one step of dim 0.
pub(crate) fn row_len(tensor: &SpdTensor) -> usize {
    tensor.dim[1..tensor.rank as usize].iter().map(|n| n.unsigned_abs() as usize).product()
}

/// Where each tensor of `kind` begins in its arena, in bytes, and the arena's length.
pub(crate) fn arena(program: &Program, kind: u32, tokens: usize, seqs: usize, logits: usize) -> (Vec<usize>, usize) {
    let mut at = 0usize;
    let mut offsets = Vec::new();
    for tensor in program.tensors().iter().filter(|tensor| tensor.kind == kind) {
        at = at.next_multiple_of(ARENA_ALIGN);
        offsets.push(at);
        at += rows_of(tensor, tokens, seqs, logits) * row_len(tensor) * 4;
    }
    (offsets, at)
}

/// What a program is compiled from.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) program: Program,
    pub(crate) weights: Vec<Arc<Weight>>,
    pub(crate) pools: Vec<Arc<Pool>>,
    pub(crate) bucket: SpdBucket,
}

/// A program that was checked, and where its tensors will be.
#[derive(Debug)]
struct Layout {
    order: Vec<Vec<usize>>,
    places: Vec<Place>,
    /// Values of the arena.
    arena_len: usize,
    sizes: PlanSizes,
}

impl Request {
    /// What a plan for steps of `n_threads` threads takes.
    ///
    /// # Errors
    /// As of [`Plan::compile`], but for memory.
    pub(crate) fn sizes(&self, n_threads: usize) -> Result<PlanSizes> {
        self.layout(n_threads).map(|layout| layout.sizes)
    }

    fn layout(&self, n_threads: usize) -> Result<Layout> {
        let Self { program, weights, pools, bucket } = self;
        if bucket.max_tokens == 0 || bucket.max_tokens > 1 << 20 || bucket.max_logits > bucket.max_tokens {
            return Err(PluginError::invalid("a bucket without tokens, of too many, or with more logits than tokens"));
        }
        let bound = Bound { program, weights, pools };
        for (index, op) in program.ops().iter().enumerate() {
            bound.check_op(op).map_err(|error| error.at(index))?;
        }
        let (tokens, seqs, logits) = (bucket.max_tokens as usize, bucket.max_seqs as usize, bucket.max_logits as usize);
        let order = joint::order(program);
        let (places, arena_len) = place(program, &order, tokens, seqs, logits)?;
        let beside = Steps { program, weights, pools, bucket: *bucket, n_threads }.bytes();
        let sizes = PlanSizes {
            workspace: (arena_len as u64 * 4).saturating_add(beside as u64),
            input: arena(program, T_INPUT, tokens, seqs, logits).1 as u64,
            output: arena(program, T_OUTPUT, tokens, seqs, logits).1 as u64,
        };
        Ok(Layout { order, places, arena_len, sizes })
    }
}

impl Plan {
    /// A plan for steps of the team. Weights that it multiplies with rounded activations are packed.
    ///
    /// # Errors
    /// An operator that does not fit its tensors, or no memory.
    pub(crate) fn compile(request: Request, team: &Team, usage: &Arc<Usage>) -> Result<(Self, PlanSizes)> {
        let Layout { order, places, arena_len, sizes } = request.layout(team.len())?;
        let Request { program, weights, pools, bucket } = request;
        let multiplied = program.ops().iter().filter_map(rounded_weight);
        let multiplied = multiplied.map(|id| &*weights[program.tensors()[id as usize].bind as usize]);
        pack(&multiplied.collect::<Vec<_>>(), team, usage)?;
        let held = usage.hold(|u| &u.workspace, sizes.workspace)?;
        let no_memory = |error: std::io::Error| PluginError::new(E_NOMEM_DEVICE, format!("a workspace: {error}"));
        let arena = MmapMut::map_anon((arena_len * 4).max(1)).map_err(no_memory)?;
        // A refusal costs speed only.
        let _refused = arena.advise(Advice::HugePage);
        let workspace = Mutex::new(Workspace { arena, rounded: Scratch::default(), scores: Vec::new() });
        Ok((Self { program, weights, pools, bucket, places, order, workspace, _held: held }, sizes))
    }
}

/// Gives every tensor inside the plan a range of the arena that no tensor alive at the same time has.
fn place(
    program: &Program,
    order: &[Vec<usize>],
    tokens: usize,
    seqs: usize,
    logits: usize,
) -> Result<(Vec<Place>, usize)> {
    let (tensors, ops) = (program.tensors(), program.ops());
    let owner = |id: u32| owner(program, id);
    let mut last_use = vec![None; tensors.len()];
    for (at, together) in order.iter().enumerate() {
        let all = together.iter().flat_map(|&op| ops[op].inputs.iter().chain(&ops[op].outputs));
        all.filter(|&&id| id != NO_TENSOR).for_each(|&id| last_use[owner(id)] = Some(at));
    }
    let mut places: Vec<Place> = tensors
        .iter()
        .map(|tensor| match tensor.kind {
            T_INPUT => Place::Input,
            T_OUTPUT => Place::Output,
            T_ACTIVATION => Place::Workspace(usize::MAX),
            T_VIEW => Place::View,
            _ => Place::Weight,
        })
        .collect();
    let (mut alive, mut end): (Vec<(usize, usize, usize)>, usize) = (Vec::new(), 0); // (offset, length, tensor)
    for (at, together) in order.iter().enumerate() {
        for &op in together {
            for &id in ops[op].outputs.iter().filter(|&&id| id != NO_TENSOR) {
                let id = id as usize;
                if !matches!(places[id], Place::Workspace(usize::MAX)) {
                    continue;
                }
                let length = (rows_of(&tensors[id], tokens, seqs, logits) * row_len(&tensors[id])).next_multiple_of(16);
                let offset = first_gap(&mut alive, length);
                alive.push((offset, length, id));
                end = end.max(offset + length);
                places[id] = Place::Workspace(offset);
            }
            let unwritten = |&&id: &&u32| id != NO_TENSOR && matches!(places[owner(id)], Place::Workspace(usize::MAX));
            if ops[op].inputs.iter().any(|id| unwritten(&id)) {
                return Err(PluginError::invalid("reads a tensor that nothing has written").at(op));
            }
        }
        alive.retain(|&(_, _, id)| last_use[id].is_some_and(|last| last > at));
    }
    Ok((places, end))
}

/// The lowest offset at which `length` values fit between what is alive.
fn first_gap(alive: &mut [(usize, usize, usize)], length: usize) -> usize {
    alive.sort_unstable();
    let mut at = 0;
    for &(offset, taken, _) in alive.iter() {
        if offset >= at + length {
            break;
        }
        at = at.max(offset + taken);
    }
    at
}
