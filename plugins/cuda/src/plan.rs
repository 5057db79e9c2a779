//! What is prepared once so that a step only enqueues? Launches, the workspace, and frames for steps in flight.

use crate::check::Bound;
use crate::driver::{Address, Context};
use crate::frame::{Copied, Frame, Layout, Scratch};
use crate::ledger::Ledger;
use crate::lower::{Lowered, Parameter, lower};
use crate::memory::{Counted, Weight};
use crate::place::{ALIGN, Sizes, arena, place};
use crate::pool::Pool;
use sparsed_abi::{DT_F32, OP_EMBED, Program, STEP_NAN_GUARD, SpdBucket, StepArrays, T_INPUT, T_OUTPUT};
use sparsed_plugin_kit::{PlanSizes, PluginError, Result, Run, Usage};
use std::sync::{Arc, Mutex, Weak};

/// Steps of a plan that may be in flight at once. The third is staged while one computes and one waits behind it.
const FRAMES: usize = 3;

/// Most rows of a step.
const ROWS_MAX: u32 = 1 << 20;

/// A compiled program.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) launches: Vec<Lowered>,
    pub(crate) frames: Vec<Arc<Frame>>,
    /// Who has used the workspace last. There is one, so steps of different queues take turns on the device; whoever
    /// enqueues holds the lock.
    pub(crate) turn: Mutex<Option<(Weak<Ledger>, Arc<Frame>)>>,
    pub(crate) layout: Layout,
    program: Program,
    weights: Vec<Arc<Weight>>,
    pools: Vec<Arc<Pool>>,
    bucket: SpdBucket,
    /// Token ids are less than this.
    vocabulary: u32,
    _workspace: Counted,
}

impl Plan {
    pub(crate) fn compile(
        program: Program,
        weights: Vec<Arc<Weight>>,
        pools: Vec<Arc<Pool>>,
        bucket: SpdBucket,
        context: &Arc<Context>,
        usage: &Arc<Usage>,
    ) -> Result<(Self, PlanSizes)> {
        if bucket.max_tokens == 0 || bucket.max_tokens.max(bucket.max_seqs) > ROWS_MAX {
            return Err(PluginError::invalid("a bucket without tokens, or of more than 2^20"));
        }
        if bucket.max_logits > bucket.max_tokens {
            return Err(PluginError::invalid("a bucket with more logits rows than tokens"));
        }
        let bound = Bound { program: &program, weights: &weights };
        let launches = program.ops().iter().enumerate();
        let launches = launches.map(|(index, op)| lower(bound, op).map_err(|error| error.at(index)));
        let launches = launches.collect::<Result<Vec<_>>>()?;
        let embeds = program.ops().iter().filter(|op| op.kind == OP_EMBED);
        let rows = embeds.map(|op| bound.matrix(op.inputs[0]).map(|matrix| matrix.rows));
        let vocabulary = rows.collect::<Result<Vec<_>>>()?.into_iter().min().unwrap_or(u32::MAX);

        let sizes = Sizes::of_bucket(&bucket);
        let (places, workspace_bytes) = place(&program, sizes)?;
        let input_bytes = arena(&program, T_INPUT, sizes, |_, _, _| ())?;
        let output_bytes = arena(&program, T_OUTPUT, sizes, |_, _, _| ())?;
        let layout = layout(sizes, input_bytes, output_bytes);
        let workspace = Counted::allocate(context, usage, |u| &u.workspace, workspace_bytes)?;
        let address = |place: &Option<u64>| place.map_or(0, |at| workspace.address() + at);
        let addresses: Vec<Address> = places.iter().map(address).collect();
        let n_outputs = program.tensors().iter().filter(|tensor| tensor.kind == T_OUTPUT).count();
        let frames = (0..FRAMES).map(|_| {
            let scratch = Scratch { addresses: addresses.clone(), outputs: Vec::with_capacity(n_outputs) };
            Frame::new(context, usage, layout, layout.end, scratch).map(Arc::new)
        });
        let frames = frames.collect::<Result<Vec<_>>>()?;
        let sizes = PlanSizes { workspace: workspace_bytes, input: input_bytes, output: output_bytes };
        let (turn, _workspace) = (Mutex::new(None), workspace);
        Ok((Self { launches, frames, turn, layout, program, weights, pools, bucket, vocabulary, _workspace }, sizes))
    }

    /// Whether a step fits.
    ///
    /// # Errors
    /// `SPD_E_INVALID` and what does not.
    pub(crate) fn check_step(&self, run: &Run<'_>) -> Result<()> {
        let (step, bucket) = (&run.step, &self.bucket);
        let (tokens, seqs, logits) = (step.tokens.len(), step.contexts.len(), step.rows.len());
        let fits = tokens <= bucket.max_tokens as usize
            && seqs <= bucket.max_seqs as usize
            && logits <= bucket.max_logits as usize;
        if !fits || step.contexts.iter().any(|&n| n > bucket.max_context) {
            let asked = format!("{tokens} tokens, {seqs} sequences, {logits} logits rows");
            return Err(PluginError::invalid(format!("step: {asked} or a context beyond the bucket {bucket:?}")));
        }
        if step.flags & !STEP_NAN_GUARD != 0 {
            return Err(PluginError::unsupported(format!("step: flags {:#x}", step.flags)));
        }
        if let Some(token) = step.tokens.iter().find(|&&token| token >= self.vocabulary) {
            return Err(PluginError::invalid(format!("token {token} of a vocabulary of {}", self.vocabulary)));
        }
        self.pools.iter().try_for_each(|pool| pool.check_step(step))?;
        let sizes = Sizes::of_step(step);
        for (kind, length, name) in [(T_INPUT, run.input.len(), "input"), (T_OUTPUT, run.output.len(), "output")] {
            let needed = arena(&self.program, kind, sizes, |_, _, _| ())?;
            if (length as u64) < needed {
                return Err(PluginError::invalid(format!("{name} arena: {length} bytes, {needed} are needed")));
            }
        }
        Ok(())
    }

    /// Puts a checked step's arguments into a taken frame: bytes to copy in, and bytes of output.
    ///
    /// # Errors
    /// None that [`Self::check_step`] has not found before.
    pub(crate) fn stage(&self, frame: &Frame, run: &Run<'_>) -> Result<(u64, u64)> {
        let (layout, sizes) = (self.layout, Sizes::of_step(&run.step));
        let mut scratch = frame.scratch();
        let Scratch { addresses, outputs } = &mut *scratch;
        let place = |id: usize, at, _| addresses[id] = frame.address(layout.input + at);
        let input_bytes = arena(&self.program, T_INPUT, sizes, place)?;
        outputs.clear();
        let output_bytes = arena(&self.program, T_OUTPUT, sizes, |id, at, bytes| {
            addresses[id] = frame.address(layout.output + at);
            let is_f32 = self.program.tensors()[id].dtype == DT_F32;
            outputs.push(Copied { from: at, to: at, bytes, is_f32 });
        })?;
        // SAFETY: the step is inside the bucket that the layout was made for; the frame is taken.
        unsafe {
            frame.stage(0, run.step.tokens);
            frame.stage(layout.rows, run.step.rows);
            frame.stage(layout.input, &run.input[..input_bytes as usize]);
        }
        Ok((layout.input + input_bytes, output_bytes))
    }

    /// The word of a parameter in this step.
    pub(crate) fn word(&self, parameter: Parameter, frame: &Frame, step: &StepArrays<'_>, scratch: &Scratch) -> u64 {
        match parameter {
            Parameter::Cancel => frame.cancel_address(),
            Parameter::Tokens => frame.address(0),
            Parameter::Rows => frame.address(self.layout.rows),
            Parameter::Null => 0,
            Parameter::Weight(slot) => self.weights[slot as usize].address(),
            Parameter::Tensor { owner, offset } => scratch.addresses[owner as usize] + offset,
            Parameter::Dim(dim) => step.dim(dim) as u64,
            Parameter::Word(word) => word.into(),
        }
    }
}

fn layout(sizes: Sizes, input_bytes: u64, output_bytes: u64) -> Layout {
    let rows = (sizes.tokens * 4).next_multiple_of(ALIGN);
    let input = (rows + sizes.logits * 4).next_multiple_of(ALIGN);
    let output = (input + input_bytes).next_multiple_of(ALIGN);
    Layout { rows, input, output, end: output + output_bytes }
}
