//! L3: is what is computed from the slow tier what is computed from the pool, and is a bad page found?

use super::attention::{self, Heads, Op, queries};
use super::blocks::export;
use super::refused;
use super::sequences::{any_format, everyone};
use crate::cache::{Contents, Plane, Shape, row_formats};
use crate::case::{CLASS_F, Ready, Words, as_floats, close, wide};
use crate::child::Context;
use crate::rig::{Fault, Pool, RunParts, Session, struct_size};
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure, skip};
use sparsed_abi::{
    E_ABI, E_DATA, E_INVALID, E_NOMEM_DEVICE, E_UNSUPPORTED, FEAT_SLOW_FILE, FEAT_SLOW_HOST, KV_LIMIT_CACHE,
    KV_TO_FAST, KV_TO_SLOW, OP_DENSE_MLA, OP_SPARSE_MLA, SpdKvDesc, SpdKvOp, SpdKvSlow,
};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::rc::Rc;

const PLACE: &str = "OPS.md, pages of the slow tier";
const NEEDS: &[&str] = &["op.dense_mla.golden", "op.sparse_mla.golden", "kv.export_import"];

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L3,
        "slow.refused",
        "a kind of slow tier that is not claimed is refused, and so is a slow block in a pool without a slow tier",
        "plugin.h, spd_kv_slow",
        &["kv.create"],
        not_claimed,
    ),
    rule(
        Level::L3,
        "slow.file",
        "with SPD_FEAT_SLOW_FILE attention over slow blocks is the same to the bit, and they come back",
        PLACE,
        NEEDS,
        |context| same_as_fast(context, Kind::File),
    ),
    rule(
        Level::L3,
        "slow.host",
        "with SPD_FEAT_SLOW_HOST attention over slow blocks is the same to the bit, and they come back",
        PLACE,
        NEEDS,
        |context| same_as_fast(context, Kind::Host),
    ),
    rule(
        Level::L3,
        "slow.file_bad_page",
        "a page of the file that is not what it should be is SPD_E_DATA with its block, and the step can be repeated",
        PLACE,
        &["slow.file"],
        |context| bad_page(context, Kind::File),
    ),
    rule(
        Level::L3,
        "slow.host_bad_page",
        "a page in memory that is not what it should be is SPD_E_DATA with its block, and the step can be repeated",
        PLACE,
        &["slow.host"],
        |context| bad_page(context, Kind::Host),
    ),
];

const PAGE: usize = 4096;
/// A row cache that holds every row of these checks, in bytes.
const ROOMY: u64 = 1 << 20;
/// Bytes of a page after its rows and zeros.
const TRAILER: usize = 16;
/// The area begins here, so that who forgets `spd_kv_slow.offset` reads nothing good.
const OFFSET: usize = 2 * PAGE;
const HEADS: Heads = Heads { heads: 4, groups: 1, with_latent_query: true, scale: 0.17 };

/// Where a slow area lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    File,
    Host,
}

impl Kind {
    fn claimed(session: &Session) -> Vec<Self> {
        let all = [(Self::File, FEAT_SLOW_FILE), (Self::Host, FEAT_SLOW_HOST)];
        all.into_iter().filter(|(_, feature)| session.claims(*feature)).map(|(kind, _)| kind).collect()
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// A slow area and what it is in.
struct Area {
    kind: Kind,
    pages: Vec<Page>,
    file: std::fs::File,
    cache_bytes: u64,
}

impl Area {
    fn new(kind: Kind, pages: usize) -> Result<Self, Wrong> {
        // In memory: a confined process may create no other.
        let file = rustix::fs::memfd_create("slow area", rustix::fs::MemfdFlags::CLOEXEC);
        let file = file.map_err(|errno| Wrong::Failed(format!("no file for the slow area: {errno}")))?.into();
        let area = Self { kind, pages: vec![Page([0xee; PAGE]); OFFSET / PAGE + pages], file, cache_bytes: ROOMY };
        area.flush()?;
        Ok(area)
    }

    /// Page `number` of the area, to write; [`Self::flush`] makes it seen.
    fn page(&mut self, number: usize) -> &mut [u8; PAGE] {
        &mut self.pages[OFFSET / PAGE + number].0
    }

    /// Brings the file to what the pages are.
    fn flush(&self) -> Outcome {
        use std::os::unix::fs::FileExt;
        let io = |error: std::io::Error| Wrong::Failed(format!("the slow area: {error}"));
        for (number, page) in self.pages.iter().enumerate() {
            self.file.write_all_at(&page.0, (number * PAGE) as u64).map_err(io)?;
        }
        (&self.file).flush().map_err(io)
    }

    fn desc(&self) -> SpdKvSlow {
        let (fd, ptr) = match self.kind {
            Kind::File => (self.file.as_raw_fd(), std::ptr::null()),
            Kind::Host => (0, self.pages.as_ptr().cast()),
        };
        SpdKvSlow {
            struct_size: struct_size::<SpdKvSlow>(),
            fd,
            page_bytes: 4096,
            ptr,
            offset: OFFSET as u64,
            length: (self.pages.len() * PAGE - OFFSET) as u64,
            cache_bytes: self.cache_bytes,
            ..SpdKvSlow::default()
        }
    }
}

/// Bytes of a token's latent and rope row.
fn row_bytes(shape: &Shape) -> usize {
    shape.row_bytes(Plane::Latent) + shape.row_bytes(Plane::Rope)
}

/// Pages that the latent plane of a block has, and rows in each.
fn paging(shape: &Shape) -> (usize, usize) {
    let rows = (PAGE - TRAILER) / row_bytes(shape);
    (shape.layers as usize * (shape.block_tokens as usize).div_ceil(rows), rows)
}

/// Writes the latent plane of a host image as pages from `first` on, with this tag.
fn write_pages(area: &mut Area, shape: &Shape, pool: &Pool, image: &[u8], (first, tag): (usize, u64)) {
    let (pages, rows) = paging(shape);
    let per_layer = pages / shape.layers as usize;
    let latent = &image[usize::try_from(pool.info.image_latent_offset).expect("small")..];
    let layer_bytes = latent.len() / shape.layers as usize;
    let row = layer_bytes / shape.block_tokens as usize;
    for number in 0..pages {
        let (layer, within) = (number / per_layer, number % per_layer);
        let layer = &latent[layer * layer_bytes..(layer + 1) * layer_bytes];
        let own = &layer[within * rows * row..layer_bytes.min((within + 1) * rows * row)];
        let page = area.page(first + number);
        page.fill(0);
        page[..own.len()].copy_from_slice(own);
        page[PAGE - 16..PAGE - 8].copy_from_slice(&tag.to_le_bytes());
        page[PAGE - 8..PAGE - 4].copy_from_slice(&u32::try_from(number).expect("small").to_le_bytes());
        let crc = crc32c::crc32c(&page[..PAGE - 4]);
        page[PAGE - 4..].copy_from_slice(&crc.to_le_bytes());
    }
}

/// A pool with a slow area, and some sequences in it.
struct Setting<'s> {
    session: &'s Session,
    contents: Contents,
    pool: Rc<Pool>,
    area: Area,
    step: Step,
    plans: [(Ready<'s>, Vec<Words>); 2],
}

impl<'s> Setting<'s> {
    /// With a row cache of `cached` rows, or one that holds them all.
    fn new(
        session: &'s Session,
        rng: &mut fastrand::Rng,
        shape: Shape,
        (kind, cached): (Kind, Option<usize>),
    ) -> Result<Self, Wrong> {
        let contents = attention::contents(rng, shape);
        let mut area = Area::new(kind, paging(&shape).0 * contents.shape.n_blocks as usize)?;
        area.cache_bytes = cached.map_or(ROOMY, |rows| (rows * row_bytes(&shape)) as u64);
        let slow = area.desc();
        let pool = Rc::new(session.pool(&SpdKvDesc { slow: &raw const slow, ..contents.shape.desc() })?);
        contents.write(session, &pool, &[Plane::Latent])?;
        let step = everyone(&contents);
        let q = queries(rng, &contents.shape, HEADS, step.tokens.len());
        let sel = attention::selections(rng, &step);
        let plan = |kind, sel: Option<&[i32]>| {
            let op = Op { kind, layer: 1, heads: HEADS };
            let ready = attention::program(session, &pool, &contents.shape, op, attention::K).compile(&[&step])?;
            Ok::<_, Wrong>((ready, attention::inputs(HEADS, &q, sel)))
        };
        let plans = [plan(OP_DENSE_MLA, None)?, plan(OP_SPARSE_MLA, Some(&sel))?];
        Ok(Self { session, contents, pool, area, step, plans })
    }

    /// What DENSE_MLA and SPARSE_MLA answer.
    fn answers(&self) -> Result<[Words; 2], Fault> {
        Ok([self.attempt(0)?, self.attempt(1)?])
    }

    /// What DENSE_MLA (0) or SPARSE_MLA (1) answers.
    fn attempt(&self, plan: usize) -> Result<Words, Fault> {
        let (ready, inputs) = &self.plans[plan];
        let inputs: Vec<_> = inputs.iter().map(|input| &input[..]).collect();
        let (input, mut output) = (ready.input_arena(&self.step, &inputs), ready.output_arena(&self.step));
        let blob = self.step.encode();
        let parts = RunParts { step: &blob, input: &input, output: &mut output, cancel: None };
        self.session.queue.run(&ready.plan, parts)?;
        Ok(ready.outputs_in(&self.step, &output).swap_remove(0))
    }

    /// The full blocks of the longest sequence, whose rows are all written.
    fn movable(&self) -> Vec<u32> {
        let longest = self.contents.sequences.last().expect("contents has sequences");
        longest.blocks[..(longest.n / self.contents.shape.block_tokens) as usize].to_vec()
    }

    /// Writes the blocks' pages, and tells the pool.
    fn make_slow(&mut self, blocks: &[u32]) -> Result<(), Wrong> {
        let shape = self.contents.shape;
        let images = export(self.session, &self.pool, blocks)?;
        let pages = paging(&shape).0;
        let mut ops = Vec::new();
        // From the end of the area, so that a block's number says nothing about where it lies.
        for (i, (&block, image)) in blocks.iter().zip(&images).enumerate() {
            let (first, tag) = ((shape.n_blocks as usize - 1 - i) * pages, 0x5eed_0000_0000_0000 | u64::from(block));
            write_pages(&mut self.area, &shape, &self.pool, image, (first, tag));
            let slow_offset = (first * PAGE) as u64;
            ops.push(SpdKvOp { kind: KV_TO_SLOW, dst_block: block, slow_offset, tag, ..SpdKvOp::default() });
        }
        self.area.flush()?;
        self.session.queue.kv(&self.pool, &ops, &mut [])?;
        Ok(())
    }
}

fn not_claimed(context: &Context) -> Outcome {
    let session = context.session()?;
    let shape = Shape::usual(&session, any_format(&session)?);
    for (kind, feature) in [(Kind::File, FEAT_SLOW_FILE), (Kind::Host, FEAT_SLOW_HOST)] {
        if !session.claims(feature) {
            let area = Area::new(kind, 4)?;
            let slow = area.desc();
            let answer = session.pool(&SpdKvDesc { slow: &raw const slow, ..shape.desc() });
            refused(&format!("a slow tier of kind {kind:?}"), answer, &[E_UNSUPPORTED, E_ABI])?;
        }
    }
    let pool = shape.pool(&session)?;
    let to_slow = SpdKvOp { kind: KV_TO_SLOW, ..SpdKvOp::default() };
    let answer = session.queue.kv(&pool, &[to_slow], &mut []);
    refused("SPD_KV_TO_SLOW in a pool without a slow tier", answer, &[E_INVALID, E_UNSUPPORTED, E_ABI])?;
    let limit = SpdKvOp { kind: KV_LIMIT_CACHE, cache_bytes: ROOMY, ..SpdKvOp::default() };
    let answer = session.queue.kv(&pool, &[limit], &mut []);
    refused("SPD_KV_LIMIT_CACHE in a pool without a slow tier", answer, &[E_INVALID, E_UNSUPPORTED, E_ABI])
}

fn same_as_fast(context: &Context, kind: Kind) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    if !Kind::claimed(&session).contains(&kind) {
        return skip("it is not claimed");
    }
    for format in row_formats(&session) {
        // Three pages a layer in f32: rows do not fill a page evenly.
        let shape = Shape { latent: 128, index_layers: 1, ..Shape::usual(&session, format) };
        // All rows; those of two selections, so that rows give way to others; fewer than one selection has.
        for cached in [None, Some(2 * attention::K), Some(attention::K / 2)] {
            there_and_back(&session, &mut rng, shape, (kind, cached))?;
        }
    }
    Ok(())
}

/// Blocks go to the slow tier and come back, and nobody can tell.
fn there_and_back(
    session: &Session,
    rng: &mut fastrand::Rng,
    shape: Shape,
    (kind, cached): (Kind, Option<usize>),
) -> Outcome {
    let mut setting = Setting::new(session, rng, shape, (kind, cached))?;
    let what = format!(
        "{}, a cache of {} rows",
        shape.format.name(),
        cached.map_or_else(|| "all".to_owned(), |n| n.to_string())
    );
    let (fast, blocks) = (setting.answers()?, setting.movable());
    let images = export(session, &setting.pool, &blocks)?;
    setting.make_slow(&blocks)?;
    for again in ["first", "second"] {
        // Rows that a token lists at most.
        for (plan, listed) in [(0, usize::MAX), (1, attention::K)] {
            match setting.attempt(plan) {
                Err(fault) if fault.status == E_NOMEM_DEVICE && cached.is_some_and(|rows| rows < listed) => {}
                answer => ensure!(answer? == fast[plan], "{what}: the {again} step over slow blocks gives other bits"),
            }
        }
    }
    if cached.is_none() {
        limit(session, &setting, &fast)?;
    }
    let exported = export(session, &setting.pool, &blocks)?;
    ensure!(exported == images, "{what}: the image of a slow block differs");
    let back = |&block: &u32| SpdKvOp { kind: KV_TO_FAST, dst_block: block, ..SpdKvOp::default() };
    session.queue.kv(&setting.pool, &blocks.iter().map(back).collect::<Vec<_>>(), &mut [])?;
    // Nobody reads the area any more.
    setting.area.pages.fill(Page([0xee; PAGE]));
    setting.area.flush()?;
    ensure!(setting.answers()? == fast, "{what}: blocks that came back give other bits");
    Ok(())
}

/// The row cache becomes smaller and larger again, and nobody can tell. A plugin may keep it as it is.
fn limit(session: &Session, setting: &Setting<'_>, fast: &[Words; 2]) -> Outcome {
    for cache_bytes in [ROOMY / 2, ROOMY] {
        let op = SpdKvOp { kind: KV_LIMIT_CACHE, cache_bytes, ..SpdKvOp::default() };
        match session.queue.kv(&setting.pool, &[op], &mut []) {
            Err(fault) if fault.status == E_UNSUPPORTED => return Ok(()),
            done => done?,
        };
        ensure!(setting.answers()? == *fast, "with a row cache of {cache_bytes} bytes a step gives other bits");
    }
    Ok(())
}

/// The file is read in a process that is confined already.
pub(super) fn read_while_confined(context: &Context) -> Outcome {
    same_as_fast(context, Kind::File)
}

fn bad_page(context: &Context, kind: Kind) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let shape = Shape { latent: 128, index_layers: 1, ..Shape::usual(&session, any_format(&session)?) };
    let (pages, _) = paging(&shape);
    // A row, the tag, the page's number, the CRC.
    for at in [100, PAGE - 16, PAGE - 8, PAGE - 1] {
        let mut setting = Setting::new(&session, &mut rng, shape, (kind, None))?;
        let (fast, blocks) = (setting.answers()?, setting.movable());
        setting.make_slow(&blocks)?;
        // The last page of the second block: of layer 1, which the steps read.
        let bad = (setting.contents.shape.n_blocks as usize - 2) * pages + pages - 1;
        setting.area.page(bad)[at] ^= 0x10;
        setting.area.flush()?;
        let Err(fault) = setting.attempt(0) else {
            return Err(Wrong::Failed("a step over a bad page is taken, SPD_E_DATA is right".to_owned()));
        };
        ensure!(fault.status == E_DATA, "byte {at} of a page changed: {fault}, SPD_E_DATA is right");
        let named = u32::try_from(fault.block).is_ok_and(|block| block == blocks[1]);
        ensure!(named, "spd_error.block is {}, the bad page is block {}'s", fault.block, blocks[1]);
        setting.area.page(bad)[at] ^= 0x10;
        setting.area.flush()?;
        for (fast, again) in fast.iter().zip(&setting.answers()?) {
            close(CLASS_F, "the step after its page was made good", again, &wide(&as_floats(fast)))?;
        }
    }
    Ok(())
}
