#include "hf_models.h"

#include "hf_models_text.h"  // generated from hf_models.json by CMake

namespace posenc::detail {

Json hf_model(const std::string& model_type) {
  static const Json models = Json::parse(kHfModelsText);
  const auto found = models.find(model_type);
  if (found == models.end()) {
    return Json::object();
  }
  if (!found->contains("like")) {
    return *found;
  }
  Json model = hf_model(found->at("like"));
  model.merge_patch(*found);
  return model;
}

}  // namespace posenc::detail
