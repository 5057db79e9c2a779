//! Can any bytes make the GGUF reader, a decoder or the reader of its tokenizer panic, or reach outside the file?
#![no_main]

use libfuzzer_sys::fuzz_target;
use sparsed_model::Tokenizer;
use sparsed_quant::gguf::Gguf;

fuzz_target!(|file: &[u8]| {
    let Ok(gguf) = Gguf::parse(file) else { return };
    for tensor in gguf.tensors() {
        let bytes = &file[tensor.range.clone()];
        let count = usize::try_from(tensor.values()).expect("its bytes are in memory");
        let mut values = vec![0.0; count];
        sparsed_quant::decode(tensor.format, bytes, &mut values).expect("the reader has measured it");
    }
    for (key, _) in gguf.metadata().iter() {
        // Typed access answers or refuses, whatever the value is.
        let metadata = gguf.metadata();
        drop((metadata.u32(key), metadata.u64(key), metadata.f32(key), metadata.bool(key)));
        drop((metadata.str(key), metadata.array(key), metadata.strings(key)));
    }
    drop(Tokenizer::from_metadata(gguf.metadata()));
});
