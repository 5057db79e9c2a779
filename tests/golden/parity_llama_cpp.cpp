// What does llama.cpp compute? The logits of every position of a prompt, and the tokens that its indexers select.
//
//     parity_llama_cpp MODEL.gguf IDS OUT f32|default STEP
//
// IDS: token ids as text. OUT.logits: f32 [L, vocabulary]; OUT.top_k.LAYER: i32 [L, k] of each layer with an indexer,
// in no order, with future positions where the past is shorter than k; both raw, little-endian. `f32`: rows of the
// cache in F32 and no flash attention, else what llama.cpp takes by itself. STEP: tokens of one decode.
// The result is 0, or 1 with llama.cpp's first error on stderr.
#include <ggml-backend.h>
#include <ggml.h>
#include <llama.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <vector>

// The first one is the cause; what follows says that loading failed.
static std::string first_error;

static void keep_errors(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && first_error.empty()) {
        first_error = text;
    }
}

static int refused(const char * what) {
    fprintf(stderr, "%s: %s\n", what, first_error.c_str());
    return 1;
}

// Selections by layer: graphs name them `top_k-LAYER`, and views of them the same with more behind it.
using Selections = std::map<int, std::vector<int32_t>>;

static bool keep_selections(ggml_tensor * tensor, bool ask, void * user_data) {
    const char * name = ggml_get_name(tensor);
    int layer = 0, end = 0;
    if (sscanf(name, "top_k-%d%n", &layer, &end) != 1 || name[end] != 0) {
        return false;
    }
    if (!ask) {
        GGML_ASSERT(tensor->type == GGML_TYPE_I32 && ggml_is_contiguous(tensor));
        std::vector<int32_t> & all = (*static_cast<Selections *>(user_data))[layer];
        const size_t before = all.size();
        all.resize(before + ggml_nelements(tensor));
        ggml_backend_tensor_get(tensor, all.data() + before, 0, ggml_nbytes(tensor));
    }
    return true;
}

template <typename T> static bool save(const std::string & path, const std::vector<T> & values) {
    std::ofstream out(path, std::ios::binary);
    out.write(reinterpret_cast<const char *>(values.data()), values.size() * sizeof(T));
    return out.flush().good();
}

int main(int argc, char ** argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: %s MODEL.gguf IDS OUT f32|default STEP\n", argv[0]);
        return 2;
    }
    std::vector<llama_token> ids;
    std::ifstream text(argv[2]);
    for (llama_token id; text >> id;) {
        ids.push_back(id);
    }
    const size_t step = std::max(1, atoi(argv[5]));

    llama_log_set(keep_errors, nullptr);
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        return refused("not loaded");
    }
    Selections selections;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = ids.size();
    params.n_threads = params.n_threads_batch = 1;
    params.cb_eval = keep_selections;
    params.cb_eval_user_data = &selections;
    if (!strcmp(argv[4], "f32")) {
        params.type_k = params.type_v = GGML_TYPE_F32;
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    }
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return refused("no context");
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<float> logits;
    for (size_t from = 0; from < ids.size(); from += step) {
        const size_t n = std::min(step, ids.size() - from);
        llama_batch batch = llama_batch_init(n, 0, 1);
        batch.n_tokens = n;
        for (size_t i = 0; i < n; i++) {
            batch.token[i] = ids[from + i];
            batch.pos[i] = from + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        if (llama_decode(context, batch) != 0) {
            return refused("not decoded");
        }
        llama_batch_free(batch);
        for (size_t i = 0; i < n; i++) {
            const float * row = llama_get_logits_ith(context, i);
            logits.insert(logits.end(), row, row + n_vocab);
        }
    }
    bool saved = save(std::string(argv[3]) + ".logits", logits);
    for (const auto & [layer, rows] : selections) {
        saved = saved && save(std::string(argv[3]) + ".top_k." + std::to_string(layer), rows);
    }
    llama_free(context);
    llama_model_free(model);
    return saved ? 0 : refused("not written");
}
