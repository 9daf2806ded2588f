//! The oracle: every operation in the plainest way that candle-core offers. It allocates, runs eagerly, serves nobody.
//!
//! Golden tests run the decoder on it, and the executors that serve are compared with it within a bound. With bf16
//! activations it rounds what the numerics say is rounded (matmul inputs, keys, values), but for the attention
//! probabilities, and sums in whatever order candle likes: near, never equal bit for bit.

use std::sync::Arc;

use candle_core::{D, DType, Device, IndexOp, Tensor as Candle};

use crate::DeviceError;
use crate::collective::{Collective, HostMemory, Lane};
use crate::ops::{
    Buffer, DrawResult, DrawSpec, Extent, Format, KvSpec, Matrix, MatrixSpec, Ops, Parts, SpanRows,
    StepCapacity, StepInputs, Tensor, Vector, Vocabulary,
};
use crate::random::{Purpose, exponential, uniform, words};

/// The reference executor.
pub struct Reference {
    activation: Format,
    collective: Arc<dyn Collective>,
    matrices: Vec<Candle>,
    vectors: Vec<Candle>,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// Values and the rows that the last operation gave them.
    buffers: Vec<(Candle, usize)>,
    cache: Option<Cache>,
    step: Step,
    draws: Vec<DrawResult>,
    bytes_held: usize,
    bytes_read: u64,
    failure: Option<DeviceError>,
}

struct Cache {
    kv: KvSpec,
    capacity: StepCapacity,
    /// By layer, `[block][token][kv head][dim]`.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

#[derive(Default)]
struct Step {
    ids: Vec<u32>,
    positions: Vec<u32>,
    spans: Vec<SpanRows>,
    tables: Vec<u32>,
    picks: Vec<u32>,
    draws: Vec<DrawSpec>,
}

type Result<T> = std::result::Result<T, DeviceError>;

impl From<candle_core::Error> for DeviceError {
    fn from(error: candle_core::Error) -> Self {
        DeviceError::Reference(error.to_string())
    }
}

impl Reference {
    /// An executor whose matmul inputs, keys and values are of `activation` (f32, or rounded to bf16).
    pub fn new(activation: Format, collective: Arc<dyn Collective>) -> Self {
        Self {
            activation,
            collective,
            matrices: Vec::new(),
            vectors: Vec::new(),
            cos: Vec::new(),
            sin: Vec::new(),
            buffers: Vec::new(),
            cache: None,
            step: Step::default(),
            draws: Vec::new(),
            bytes_held: 0,
            bytes_read: 0,
            failure: None,
        }
    }

    /// Rounds to the activation format.
    fn round(&self, x: &Candle) -> Result<Candle> {
        Ok(match self.activation {
            Format::Bf16 => x.to_dtype(DType::BF16)?.to_dtype(DType::F32)?,
            _ => x.clone(),
        })
    }

    fn get(&self, buffer: Buffer) -> Candle {
        self.buffers[buffer.0 as usize].0.clone()
    }

    /// Keeps what an operation gave, or its failure for `submit`.
    fn set(&mut self, buffer: Buffer, value: Result<Candle>) {
        let (slot, width) = &mut self.buffers[buffer.0 as usize];
        match value {
            Ok(value) => {
                assert_eq!(
                    value.dims2().map(|(_, w)| w).ok(),
                    Some(*width),
                    "the buffer's width is the operation's"
                );
                *slot = value;
            }
            Err(failure) => {
                self.failure.get_or_insert(failure);
            }
        }
    }

    fn product(&mut self, a: Buffer, w: Matrix, bias: Option<Vector>) -> Result<Candle> {
        let w = self.matrices[w.0 as usize].clone();
        self.bytes_read += (w.elem_count() * 4) as u64;
        let product = self.round(&self.get(a))?.matmul(&w.t()?)?;
        self.biased(product, bias)
    }

    fn biased(&self, x: Candle, bias: Option<Vector>) -> Result<Candle> {
        Ok(match bias {
            Some(bias) => x.broadcast_add(&self.vectors[bias.0 as usize])?,
            None => x,
        })
    }

    fn normalised(&self, x: Buffer, weight: Vector, eps: f32) -> Result<Candle> {
        let x = self.get(x);
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = x.broadcast_div(&(mean_square + f64::from(eps))?.sqrt()?)?;
        Ok(normed.broadcast_mul(&self.vectors[weight.0 as usize])?)
    }

    /// Writes the rows' keys and values to the layer's cache; gives the rotated queries.
    fn rotate_and_write(&mut self, qkv: Buffer, layer: usize) -> Result<Candle> {
        let rows: Vec<Vec<f32>> = self.get(qkv).to_vec2()?;
        let step = std::mem::take(&mut self.step);
        let cache = self.cache.as_mut().expect("the cache is allocated before a step");
        let heads = cache.kv.heads;
        let (dim, half) = (heads.dim, heads.dim / 2);
        let rounded = |x: f32| match self.activation {
            Format::Bf16 => half::bf16::from_f32(x).to_f32(),
            _ => x,
        };
        let mut queries = Vec::with_capacity(rows.len() * heads.query_width());
        for span in &step.spans {
            for row in span.row0..span.row0 + span.rows {
                let position = step.positions[row as usize] as usize;
                let mut qkv = rows[row as usize].clone();
                for head in qkv[..(heads.query + heads.kv) * dim].chunks_exact_mut(dim) {
                    for i in 0..half {
                        let (cos, sin) = (self.cos[position * half + i], self.sin[position * half + i]);
                        let (a, b) = (head[i], head[i + half]);
                        head[i] = a * cos - b * sin;
                        head[i + half] = b * cos + a * sin;
                    }
                }
                let block = step.tables[span.table0 as usize + position / cache.kv.block_tokens] as usize;
                let token = block * cache.kv.block_tokens + position % cache.kv.block_tokens;
                let width = heads.kv * dim;
                let (query, key_value) = qkv.split_at(heads.query_width());
                for i in 0..width {
                    cache.keys[layer][token * width + i] = rounded(key_value[i]);
                    cache.values[layer][token * width + i] = rounded(key_value[width + i]);
                }
                queries.extend_from_slice(query);
            }
        }
        self.step = step;
        Ok(Candle::from_vec(queries, (rows.len(), heads.query_width()), &Device::Cpu)?)
    }

    fn attended(&self, q: Buffer, layer: usize, scale: f32) -> Result<Candle> {
        let cache = self.cache.as_ref().expect("the cache is allocated before a step");
        let heads = cache.kv.heads;
        let width = heads.kv * heads.dim;
        let q = self.round(&self.get(q))?;
        let mut outs = Vec::new();
        for span in &self.step.spans {
            let (row0, rows) = (span.row0 as usize, span.rows as usize);
            let seen = span.start as usize + rows;
            // The sequence's keys and values, gathered through its block table: [kv head, seen, dim].
            let gathered = |from: &[f32]| -> Result<Candle> {
                let mut all = Vec::with_capacity(seen * width);
                for position in 0..seen {
                    let block =
                        self.step.tables[span.table0 as usize + position / cache.kv.block_tokens] as usize;
                    let token = block * cache.kv.block_tokens + position % cache.kv.block_tokens;
                    all.extend_from_slice(&from[token * width..(token + 1) * width]);
                }
                Ok(Candle::from_vec(all, (seen, heads.kv, heads.dim), &Device::Cpu)?
                    .transpose(0, 1)?
                    .contiguous()?)
            };
            let (keys, values) = (gathered(&cache.keys[layer])?, gathered(&cache.values[layer])?);
            let group = heads.query / heads.kv;
            let mask: Vec<f32> = (0..group * rows)
                .flat_map(|i| {
                    let last = span.start as usize + i % rows;
                    (0..seen).map(move |position| if position <= last { 0.0 } else { f32::NEG_INFINITY })
                })
                .collect();
            let mask = Candle::from_vec(mask, (1, group * rows, seen), &Device::Cpu)?;
            // [rows, query head, dim] -> [kv head, group × rows, dim]
            let q = q
                .i(row0..row0 + rows)?
                .reshape((rows, heads.query, heads.dim))?
                .transpose(0, 1)?
                .reshape((heads.kv, group * rows, heads.dim))?
                .contiguous()?;
            let scores =
                (q.matmul(&keys.transpose(1, 2)?.contiguous()?)? * f64::from(scale))?.broadcast_add(&mask)?;
            let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
            let out = weights.matmul(&values)?.reshape((heads.query, rows, heads.dim))?.transpose(0, 1)?;
            outs.push(out.reshape((rows, heads.query_width()))?);
        }
        Ok(Candle::cat(&outs, 0)?)
    }

    /// Sums or gathers over the ranks through a copy on the host.
    fn exchanged(&self, x: Buffer, rows_gathered: Option<usize>) -> Result<Candle> {
        let x = self.get(x);
        let (rows, width) = x.dims2()?;
        let mut part: Vec<f32> = x.flatten_all()?.to_vec1()?;
        let lane = Lane { thread: 0, threads: 1 };
        let memory = HostMemory { data: part.as_mut_ptr(), len: part.len() };
        let Some(rows_gathered) = rows_gathered else {
            // SAFETY: `part` outlives the call and is this thread's own; the only thread of this rank makes the call.
            unsafe { self.collective.all_reduce(lane, memory)? };
            return Ok(Candle::from_vec(part, (rows, width), &Device::Cpu)?);
        };
        let ranks = self.collective.ranks();
        let mut whole = vec![0.0_f32; part.len() * ranks];
        let gathered = HostMemory { data: whole.as_mut_ptr(), len: whole.len() };
        // SAFETY: as above, for both vectors.
        unsafe { self.collective.all_gather(lane, rows_gathered, memory, gathered)? };
        Ok(Candle::from_vec(whole, (rows, width * ranks), &Device::Cpu)?)
    }
}

impl Ops for Reference {
    fn activation(&self) -> Format {
        self.activation
    }

    fn collective(&self) -> &Arc<dyn Collective> {
        &self.collective
    }

    fn load_matrix(&mut self, spec: MatrixSpec<'_>) -> Result<Matrix> {
        let parts: &[Tensor<'_>] = match &spec.parts {
            Parts::Stack(parts) => parts,
            Parts::GateUp(pair) => pair,
        };
        let mut values = Vec::new();
        for part in parts {
            part.check()?;
            if part.cols != parts[0].cols {
                return Err(DeviceError::shape(
                    part.name,
                    format!("{} inputs", parts[0].cols),
                    part.cols.to_string(),
                ));
            }
            for row in 0..part.rows {
                values.extend((0..part.cols).map(|col| converted(part.at(row, col), spec.format)));
            }
        }
        let rows = parts.iter().map(|part| part.rows).sum::<usize>();
        self.bytes_held += values.len() * 4;
        self.matrices.push(Candle::from_vec(values, (rows, parts[0].cols), &Device::Cpu)?);
        Ok(Matrix(self.matrices.len() as u32 - 1))
    }

    fn load_vector(&mut self, values: &[f32]) -> Result<Vector> {
        self.bytes_held += values.len() * 4;
        self.vectors.push(Candle::from_slice(values, values.len(), &Device::Cpu)?);
        Ok(Vector(self.vectors.len() as u32 - 1))
    }

    fn load_rotary(&mut self, cos: &[f32], sin: &[f32]) -> Result<()> {
        (self.cos, self.sin) = (cos.to_vec(), sin.to_vec());
        Ok(())
    }

    fn buffer(&mut self, _extent: Extent, width: usize) -> Result<Buffer> {
        self.buffers.push((Candle::zeros((0, width), DType::F32, &Device::Cpu)?, width));
        Ok(Buffer(self.buffers.len() as u32 - 1))
    }

    fn allocate_kv(&mut self, kv: KvSpec, capacity: StepCapacity) -> Result<()> {
        let layer = vec![0.0_f32; kv.blocks * kv.block_tokens * kv.heads.kv * kv.heads.dim];
        let layers = vec![layer; kv.layers];
        self.cache = Some(Cache { kv, capacity, keys: layers.clone(), values: layers });
        Ok(())
    }

    fn weight_bytes(&self) -> usize {
        self.bytes_held
    }

    fn begin(&mut self, inputs: &StepInputs<'_>) -> Result<()> {
        let cache = self.cache.as_mut().expect("the cache is allocated before a step");
        inputs.check(&cache.kv, &cache.capacity)?;
        let block = cache.kv.block_tokens * cache.kv.heads.kv * cache.kv.heads.dim;
        for &zeroed in inputs.zeroes {
            for layer in cache.keys.iter_mut().chain(&mut cache.values) {
                layer[zeroed as usize * block..(zeroed as usize + 1) * block].fill(0.0);
            }
        }
        for &(from, to) in inputs.copies {
            for layer in cache.keys.iter_mut().chain(&mut cache.values) {
                layer.copy_within(from as usize * block..(from as usize + 1) * block, to as usize * block);
            }
        }
        self.draws.clear();
        self.step = Step {
            ids: inputs.ids.to_vec(),
            positions: inputs.positions.to_vec(),
            spans: inputs.spans.to_vec(),
            tables: inputs.tables.to_vec(),
            picks: inputs.picks.to_vec(),
            draws: inputs.draws.to_vec(),
        };
        Ok(())
    }

    fn embed(&mut self, table: Matrix, first_id: u32, out: Buffer) {
        let table = &self.matrices[table.0 as usize];
        let rows = self.step.ids.iter().map(|id| match id.checked_sub(first_id) {
            Some(row) if (row as usize) < table.dims()[0] => table.i(row as usize)? + 0.0,
            _ => Candle::zeros(table.dims()[1], DType::F32, &Device::Cpu),
        });
        let rows = rows.collect::<candle_core::Result<Vec<_>>>().and_then(|rows| Candle::stack(&rows, 0));
        self.set(out, rows.map_err(DeviceError::from));
    }

    fn rms_norm(&mut self, x: Buffer, weight: Vector, eps: f32, out: Buffer) {
        let value = self.normalised(x, weight, eps);
        self.set(out, value);
    }

    fn matmul(&mut self, a: Buffer, w: Matrix, bias: Option<Vector>, out: Buffer) {
        let (width, outputs) = (self.buffers[out.0 as usize].1, self.matrices[w.0 as usize].dims()[0]);
        let value = self.product(a, w, bias).and_then(|x| Ok(x.pad_with_zeros(1, 0, width - outputs)?));
        self.set(out, value);
    }

    fn rope_kv(&mut self, qkv: Buffer, layer: usize, q: Buffer) {
        let value = self.rotate_and_write(qkv, layer);
        self.set(q, value);
    }

    fn attention(&mut self, q: Buffer, layer: usize, scale: f32, out: Buffer) {
        let value = self.attended(q, layer, scale);
        self.set(out, value);
    }

    fn swiglu(&mut self, gate_up: Buffer, out: Buffer) {
        let halves = self.get(gate_up).chunk(2, 1);
        let value = halves.and_then(|halves| &halves[0].silu()? * &halves[1]);
        self.set(out, value.map_err(DeviceError::from));
    }

    fn add(&mut self, x: Buffer, y: Buffer, bias: Option<Vector>) {
        let sum = self.biased(self.get(y), bias).and_then(|y| Ok((self.get(x) + y)?));
        self.set(x, sum);
    }

    fn pick(&mut self, x: Buffer, out: Buffer) {
        let picked = Candle::new(&self.step.picks[..], &Device::Cpu)
            .and_then(|picks| self.get(x).index_select(&picks, 0));
        self.set(out, picked.map_err(DeviceError::from));
    }

    fn sample(&mut self, logits: Buffer, vocabulary: Vocabulary) {
        match self.get(logits).to_vec2::<f32>() {
            Ok(rows) => {
                self.draws = rows
                    .iter()
                    .zip(&self.step.draws)
                    .map(|(row, spec)| draw(&row[..vocabulary.size], spec, vocabulary.drawn))
                    .collect();
            }
            Err(failure) => {
                self.failure.get_or_insert(failure.into());
            }
        }
    }

    fn all_reduce(&mut self, x: Buffer) {
        let value = self.exchanged(x, None);
        self.set(x, value);
    }

    fn all_gather(&mut self, part: Buffer, whole: Buffer) {
        let value = self.exchanged(part, Some(self.step.picks.len()));
        self.set(whole, value);
    }

    fn submit(&mut self) -> Result<()> {
        match self.failure.take() {
            Some(failure) => {
                self.collective.abort(&failure.to_string());
                Err(failure)
            }
            None => Ok(()),
        }
    }

    fn draws(&self) -> &[DrawResult] {
        &self.draws
    }

    fn read(&self, buffer: Buffer, rows: usize) -> Vec<f32> {
        let value = self.get(buffer).i(..rows).and_then(|x| x.flatten_all()?.to_vec1());
        value.expect("a buffer holds the rows that the last step gave it")
    }

    fn weight_bytes_read(&self) -> u64 {
        self.bytes_read
    }
}

fn converted(x: f32, format: Format) -> f32 {
    match format {
        Format::F32 => x,
        Format::Bf16 => half::bf16::from_f32(x).to_f32(),
        Format::F16 => half::f16::from_f32(x).to_f32(),
    }
}

/// One draw by full sorts: the contract's table read down, one line after the other.
fn draw(logits: &[f32], spec: &DrawSpec, vocabulary_drawn: usize) -> DrawResult {
    if logits.iter().any(|z| !z.is_finite()) {
        return DrawResult::NotFinite;
    }
    let by_size = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut kept: Vec<(u32, f32)> = (0_u32..)
        .zip(&logits[..vocabulary_drawn.min(logits.len())])
        .filter(|(id, _)| !spec.masked.contains(id))
        .map(|(id, z)| (id, z + 0.0))
        .collect();
    kept.sort_by(by_size);
    let Some(&greedy) = kept.first() else { return DrawResult::NoneAllowed };
    let id = if spec.temperature == 0.0 {
        greedy.0
    } else {
        for (_, z) in &mut kept {
            *z /= spec.temperature;
        }
        kept.sort_by(by_size);
        if spec.top_k > 0 {
            kept.truncate(spec.top_k as usize);
        }
        let largest = kept[0].1;
        let weight = |z: f32| f64::from(z - largest).exp() as f32;
        let total = kept.iter().map(|(_, z)| f64::from(weight(*z))).sum::<f64>() as f32;
        if spec.top_p < 1.0 {
            let mut before = 0.0_f32;
            let crossing = kept.iter().position(|(_, z)| {
                let stop = before >= spec.top_p * total;
                before += weight(*z);
                stop
            });
            kept.truncate(crossing.unwrap_or(kept.len()));
        }
        kept.retain(|(_, z)| weight(*z) >= spec.min_p);
        kept.sort_by_key(|(id, _)| *id);
        let score = |&(id, z): &(u32, f32)| {
            let x = words(spec.seed, id / 4, spec.position, Purpose::Draw)[id as usize % 4];
            z - (f64::from(exponential(uniform(x), |u| f64::from(u).ln() as f32)).ln() as f32)
        };
        let best = kept
            .iter()
            .map(|token| (score(token), token.0))
            .reduce(|best, next| if next.0 > best.0 { next } else { best });
        best.map_or(greedy.0, |(_, id)| id)
    };
    let Some(top) = spec.logprobs else {
        return DrawResult::Token { id, logprob: 0.0, rank: 0, top: Vec::new() };
    };
    let mut all: Vec<(u32, f32)> = (0_u32..).zip(logits.iter().copied()).collect();
    all.sort_by(by_size);
    let largest = f64::from(all[0].1);
    let log_sum = logits.iter().map(|&z| (f64::from(z) - largest).exp()).sum::<f64>().ln() + largest;
    let logprob = |z: f32| (f64::from(z) - log_sum) as f32;
    let rank = all.iter().position(|(other, _)| *other == id).unwrap_or(0) as u32 + 1;
    let top = all[..(top as usize).min(all.len())].iter().map(|&(id, z)| (id, logprob(z))).collect();
    DrawResult::Token { id, logprob: logprob(logits[id as usize]), rank, top }
}
